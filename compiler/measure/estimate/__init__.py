"""Estimates before building: size, work and latency of an artifact on this machine or another device."""
