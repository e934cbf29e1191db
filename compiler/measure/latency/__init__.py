"""Measuring an artifact: statistics, interleaved sampling, cold starts, and what is demanded of the figures."""
