"""Many builds: a matrix, the cache of artifacts, executors, registries, and estimates before building."""
