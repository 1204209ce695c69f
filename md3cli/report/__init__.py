"""The page to look through: records and pictures in, one self-contained HTML file (or several) out; never torch."""
