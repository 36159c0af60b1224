"""What every other room stands on: errors, the name table, the progress display."""
