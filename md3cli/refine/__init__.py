"""From what the model said to what is shown: names, thresholds, doubles, and which records; pure functions."""
