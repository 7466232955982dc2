"""Whether this run interprets Triton's kernels on the CPU instead of compiling them."""

import os

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
