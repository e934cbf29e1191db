"""Tiny models of every family and released model, and the pages that list what works for each."""
