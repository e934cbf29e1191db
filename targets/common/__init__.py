"""What lowerings of all targets share."""
