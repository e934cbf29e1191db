"""From a checkpoint on disk to a Program: reading its config and tensors, building its model and tracing one step."""
