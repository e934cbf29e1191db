"""Running an artifact alone: text in, text out. Imports neither torch nor transformers."""
