"""Decomposition of aten ops into the ops of stage CORE, which defines torch's semantics once for all targets."""
