"""Choosing formats automatically: sensitivities, exact allocation, `auto`."""
