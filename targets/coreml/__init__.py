"""The CoreML target."""
