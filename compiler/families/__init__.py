"""Tiny models of every family and released model, and the pages that say what works for each."""
