"""Text: tokenizers, windows of a corpus, perplexity, sampling and stop strings. Imports no torch."""
