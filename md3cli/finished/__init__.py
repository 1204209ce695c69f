"""Finished records read back: their file, their shape, what run.json says of them, and what md3 may replace."""
