"""Many requests through the network at once: encode, prefill, decide, answer."""
