"""What became of a model: weights, hidden states and predictions beside those of the dense one."""
