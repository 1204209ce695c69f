"""What this machine does in a second: the stages of the model, whole runs, and forms with fewer bits."""
