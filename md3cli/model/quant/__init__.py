"""Weights in 8 and 4 bits: their search, their products, their layers, and how a model is loaded with them."""
