"""Number formats, calibration, rounding and bit allocation; knows no target."""
