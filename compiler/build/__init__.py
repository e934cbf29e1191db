"""Many builds: the matrix, the cache of artifacts, executors, registries, and estimates before building."""
