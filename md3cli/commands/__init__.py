"""The commands: typed words in, one call, one exit status."""
