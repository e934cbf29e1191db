"""Judges model files that other exporters made, against the checkpoint that they were made from."""
