"""Passes that rewrite stacks of experts."""
