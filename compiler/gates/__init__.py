"""Gates: each returns a Verdict, and a gate that did not run is never a pass."""
