"""Dynamic routing: policies, and their calibration."""
