"""What holds for every test: threads that wait sleep (several test runs may share a machine), and no hub is asked."""

from __future__ import annotations

import os

os.environ.setdefault("GOMP_SPINCOUNT", "1000")
if "PYTEST_XDIST_WORKER" in os.environ:  # one process a core: more threads would only wait for each other
    os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
