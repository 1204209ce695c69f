"""One thread per process: two cores are shared, and the models of the tests are too small for more."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
