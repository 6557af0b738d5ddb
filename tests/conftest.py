"""Shared by all tests: one thread per worker, compiled graphs dropped between tests."""

import os
import signal

os.environ.setdefault("OMP_NUM_THREADS", "1")
for ignored in (signal.SIGINT, signal.SIGHUP):  # as shells hand them to what runs in the background
    if signal.getsignal(ignored) is signal.SIG_IGN:
        signal.signal(ignored, signal.default_int_handler if ignored is signal.SIGINT else signal.SIG_DFL)
