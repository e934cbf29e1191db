"""From a checkpoint on disk to a Program: its config, its tensors, its model, and the trace of one step."""
