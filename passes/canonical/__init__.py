"""Passes after which each computation has one form."""
