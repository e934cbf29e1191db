"""Passes that recognise a semantic op in many small ones."""
