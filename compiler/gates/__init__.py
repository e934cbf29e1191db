"""The gates: one file per gate. Each gate returns a Verdict; a gate that did not run is never a pass."""
