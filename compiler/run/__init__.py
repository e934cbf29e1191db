"""Running artifacts: generation, chat and serving. Imports neither torch nor transformers."""
