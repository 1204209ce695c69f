"""One file per command: options in, RunConfig out."""
