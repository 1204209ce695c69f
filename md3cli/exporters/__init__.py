"""Records in, files that other tools read out; never torch."""
