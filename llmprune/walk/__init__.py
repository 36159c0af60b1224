"""Visiting blocks in order: one block at a time on the device."""
