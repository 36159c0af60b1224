"""Pages to read in a browser: one file each, without scripts, and nothing is fetched."""
