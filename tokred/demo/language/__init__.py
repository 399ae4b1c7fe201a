"""Small language models with real perplexity, on the standard library's source, and one that recalls pairs."""
