"""Fitting a policy: traces and sensitivities from text, allocation of slots to layers, the search under a bound."""
