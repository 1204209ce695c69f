"""The parts of `tests/gpu_check.py`: what its parent needs, and what its children measure.

The parent (`options`, `children`, `results`, `predictions`, `table`, `check`) imports nothing but the standard
library: a process that never touches CUDA cannot be poisoned by it. The children (`child` and one module
for each part) do the rest.
"""
