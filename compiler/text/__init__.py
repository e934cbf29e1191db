"""Text: tokens, windows of a corpus, perplexity on them, and how the next token is chosen. Imports no torch."""
