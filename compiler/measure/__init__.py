"""Latency, bytes and FLOPs of artifacts and Programs, and the savings of dynamic routing."""
