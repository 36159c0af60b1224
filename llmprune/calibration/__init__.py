"""From text to token batches and hidden states."""
