"""Decomposition: torch's semantics, written down once in the ops of the stage CORE. One file, one kind of op."""
