"""A narrower residual stream for all blocks at once: by one rotation, or by choosing channels."""
