"""Passes that fuse patterns of small ops into semantic ops."""
