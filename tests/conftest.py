"""What holds for every test.

Threads that wait sleep (several test runs may share a machine), no hub is asked, and a Ctrl-C stops what a test starts.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

os.environ.setdefault("GOMP_SPINCOUNT", "1000")
if "PYTEST_XDIST_WORKER" in os.environ:  # one process a core: more threads would only wait for each other
    os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")


def pytest_configure(config: pytest.Config) -> None:
    """Tests but those that need a GPU see none, so that they hold on a machine that has one; `make gpu` runs those.

    What tests start inherits that Ctrl-C is ignored, as it is in the background jobs of a shell: it is not, then.
    """
    if "not gpu" in config.option.markexpr:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def interruptible() -> Iterator[None]:
    """`softlabels.cli.main` ends with Ctrl-C ignored; what later tests of this process start would inherit that."""
    yield
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch):
    """No progress is shown, and torch has one thread: more of them only wait for each other over tiny models."""
    import torch  # here, for what is set above is read when it is loaded

    monkeypatch.setenv("SOFTLABELS_QUIET", "1")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
