"""Prediction before building: what an artifact will weigh, compute and cost, on this machine or on another."""
