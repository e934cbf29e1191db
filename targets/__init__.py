"""Deployment targets, one folder each."""
