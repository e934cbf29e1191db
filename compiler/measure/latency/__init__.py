"""Measuring the latency of artifacts: demands, interleaved sampling, cold starts and statistics."""
