"""Number formats, calibration, rounding and bit allocation, independent of targets."""
