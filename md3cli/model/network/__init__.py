"""The network of Moondream 3, as the specification words it."""
