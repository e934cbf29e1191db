"""Random builds, and a judge of them that shares no code with the gates; `benchmarks/fuzz_builds.py` is the front."""
