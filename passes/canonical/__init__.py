"""Canonicalisation passes: after them, each computation has one form."""
