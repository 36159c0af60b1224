"""Reading checkpoints lazily, writing them block by block."""
