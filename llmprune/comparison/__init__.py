"""Many prunings of one model side by side: the grid, its table, what is not dominated, its page."""
