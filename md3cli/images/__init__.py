"""From a picture's bytes to the crops that the vision encoder sees, in worker processes."""
