"""What an artifact or a Program costs: latency, bytes and FLOPs, and what routing saves."""
