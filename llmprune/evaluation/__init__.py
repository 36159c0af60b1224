"""What a model is worth: perplexity of tokens, of words and bytes, and scores on tasks."""
