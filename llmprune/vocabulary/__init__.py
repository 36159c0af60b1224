"""Fewer tokens: which of them a text needs, and a checkpoint rewritten to these."""
