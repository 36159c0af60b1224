"""The commands beside pruning and planning: each takes what its flags say and prints.

`cli.py` gives them their names.
"""
