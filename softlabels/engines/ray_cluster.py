"""A Ray cluster for as long as a block runs: one of our own on this machine, or one that is there already.

Our own listens on the loopback alone, tells nobody that it was used, and is gone when the block ends or this process
dies. Of another we are one more client: only what we started there ends with us.
"""

from __future__ import annotations

import math
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from softlabels.config import RayOptions
from softlabels.errors import ConfigError

_STORE = 256 << 20  # bytes of shared memory for what is on its way: rows of shards. Ray would take 30 % of the machine
_KNOCK_SECONDS = 10.0
_LOOPBACKS = ("127.", "::1")
# Ray asks on Macs alone for the loopback (https://github.com/ray-project/ray/issues/18730): elsewhere 127.0.0.1, given
# as `_node_ip_address`, becomes the address that others reach this machine by
_ONE_MACHINE = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"


@dataclass(frozen=True, slots=True)
class Room:
    """What there is in a cluster for workers, and what one of them takes."""

    workers: int  # wanted
    fit: int  # of these, that there is room for now
    cpus: float  # a worker
    gpus: float


@contextmanager
def connect(options: RayOptions) -> Iterator[Room]:
    """Inside, this process is connected to the cluster that `options` ask for.

    A process that is connected to one already stays with it. ConfigError: Ray isn't installed, there is no cluster at
    the address, or not one worker has room in it.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is told to anyone
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # or Ray gives advice on stderr
    try:
        import ray
    except ImportError:
        raise ConfigError("--engine ray needs Ray: pip install 'softlabels[ray]'") from None
    if ray.is_initialized():
        yield _room(options, ray.cluster_resources())
        return
    with _quiet():
        try:
            _start(options)
            yield _room(options, ray.cluster_resources())
        finally:
            ray.shutdown()


def _start(options: RayOptions) -> None:
    import ray

    common: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if options.address == "local":
        _start_local(options, common)
        return
    try:
        _knock(options.address)
        ray.init(address=options.address, **common)
    except (OSError, RuntimeError, ValueError) as error:
        words = " ".join(str(error).split())[:200] or type(error).__name__
        raise ConfigError(
            f"--address {options.address}: no Ray cluster answers there ({words}). Start one (ray start --head), or "
            f"give --address local for one on this machine alone. One that asks for a token needs "
            f"RAY_AUTH_MODE=token and RAY_AUTH_TOKEN in the environment"
        ) from error


def _knock(address: str) -> None:
    """OSError where nothing listens: Ray would try for minutes, and `auto` may be what a crashed cluster has left."""
    if address == "auto":
        from ray._private.services import canonicalize_bootstrap_address

        address = canonicalize_bootstrap_address("auto") or ""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_KNOCK_SECONDS).close()


def _start_local(options: RayOptions, common: dict[str, Any]) -> None:
    import ray
    from ray._private import ray_constants

    cpus = None if options.workers is None else max(math.ceil(options.workers * options.cpus_per_worker), 1)
    with _environment(_ONE_MACHINE, "0"), _changed(ray_constants, "ENABLE_RAY_CLUSTER", False):
        ray.init(
            address="local",
            include_dashboard=False,
            num_cpus=cpus,
            num_gpus=0 if options.gpus_per_worker == 0 else None,
            object_store_memory=_STORE,
            _system_config={"worker_niceness": 0},  # as a local dump; Ray's 15 is nearly nothing on a busy machine
            **common,
        )
    address = ray.util.get_node_ip_address()
    if not address.startswith(_LOOPBACKS):
        raise ConfigError(
            f"Ray {ray.__version__} would listen on {address}, where other machines reach it, and not on the loopback: "
            f"install the version that softlabels is tested with (constraints.txt)"
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Inside, Ray does not print on our standard output what it thinks of dead workers: the pool tells of them."""
    from ray._private import worker

    with _changed(worker, "print_to_stdstream", lambda *args, **kwargs: None):
        yield


@contextmanager
def _changed(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)  # AttributeError: another version of Ray than is tested
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


@contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _room(options: RayOptions, resources: dict[str, float]) -> Room:
    """ConfigError where not one worker has room."""
    cpus, gpus = resources.get("CPU", 0.0), resources.get("GPU", 0.0)
    each = options.gpus_per_worker
    if each is None:
        each = 1.0 if gpus >= 1 else 0.0
    fit = min(_times(cpus, options.cpus_per_worker), _times(gpus, each))
    if fit < 1:
        raise ConfigError(
            f"a worker takes {options.cpus_per_worker:g} CPU(s) and {each:g} GPU(s), and the cluster has {cpus:g} and "
            f"{gpus:g}: give smaller --cpus-per-worker or --gpus-per-worker"
        )
    workers = options.workers or fit
    return Room(workers, min(workers, fit), options.cpus_per_worker, each)


def _times(have: float, each: float) -> int:
    """How often `each` goes into `have`; of nothing any number."""
    return 1_000_000 if each == 0 else math.floor(have / each + 1e-9)
