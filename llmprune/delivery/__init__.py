"""The proof that a result loads the stock way."""
