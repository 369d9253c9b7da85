"""The tests' models are tiny: one thread is fastest, and a busy machine does not slow it down."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
