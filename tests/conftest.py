"""Shared by all tests: one thread per worker, compiled graphs dropped between tests."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
