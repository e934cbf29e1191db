"""Faults that artifacts can have, one function or value each, to show that a gate finds every one of them."""
