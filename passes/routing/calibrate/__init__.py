"""Fitting a policy: traces and sensitivities from text, allocation of slots to layers, search under a loss bound."""
