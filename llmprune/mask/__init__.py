"""Which weights stay: exact counts, ranks, patterns, and masks as they are stored."""
