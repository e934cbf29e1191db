"""Passes over the stacks of experts."""
