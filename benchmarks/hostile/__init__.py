"""Damaged and hostile input files, to show that every one of them ends with a message and within limits."""
