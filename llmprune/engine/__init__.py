"""The story: plan, estimate, cut."""
