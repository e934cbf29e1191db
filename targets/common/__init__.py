"""What the lowerings of all targets share."""
