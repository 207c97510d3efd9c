"""Ray clusters: connects to the cluster of RAY_ADDRESS, or starts a local one."""

from __future__ import annotations

import itertools
import logging
import os
import secrets
import socket
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from pipeline.base.schema import Train

ItemT = TypeVar("ItemT")

ResultT = TypeVar("ResultT")

PROBE_S = 5.0

_MAX_TASKS_PER_CPU = 2  # in flight: one runs, the next is queued with its arguments in place

_OBJECT_STORE_BYTES = 200_000_000  # small, because images are read from the shards

# Read by Ray's processes and by the driver. Values that the user has set take precedence.
RAY_ENV_DEFAULTS = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",  # start-up of a run 24 s -> 18 s on 2 cores
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # a process per run; training resumes after a preemption without it
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # workers without a GPU: Ray's future default, without warning
}

# For workers of a local cluster, where all cores are busy. On 2 busy cores, 2 spinning threads reach 51 to 414
# images/s, sleeping threads 550 to 850. On idle cores, where throughput is measured, sleeping halves it.
_OMP_PASSIVE = ("OMP_WAIT_POLICY", "PASSIVE")


class ClusterError(RuntimeError):
    """The Ray cluster does not answer or is too small. The message says what to do."""


def connect(cpus: int = 1) -> None:
    """Connects this process to the cluster of RAY_ADDRESS, or starts a local one that ends with this process.

    Args:
        cpus: minimum number of cores of a local cluster.
    Raises: ClusterError within 15 s when RAY_ADDRESS does not answer.
    """
    os.environ.update({**RAY_ENV_DEFAULTS, **os.environ})
    address = os.environ.get("RAY_ADDRESS", "local")
    if "ray" in sys.modules and sys.modules["ray"].is_initialized():
        return
    if address == "local":
        _start_local_cluster(cpus)
        return
    check_address(address)
    import ray

    ray.init(log_to_driver=False, logging_level=logging.WARNING)


@contextmanager
def local_cluster(cpus: int = 1) -> Iterator[None]:
    """Sets RAY_ADDRESS to a new local cluster within the context, unless RAY_ADDRESS is already set."""
    if address := os.environ.get("RAY_ADDRESS"):
        check_address(address)
        yield
        return
    environment = dict(os.environ)
    os.environ.update({**RAY_ENV_DEFAULTS, **os.environ})
    try:
        os.environ["RAY_ADDRESS"] = _start_local_cluster(cpus)
        yield
    finally:
        sys.modules["ray"].shutdown()
        os.environ.clear()
        os.environ.update(environment)


def max_concurrent_runs(settings: Train) -> int:
    """Number of runs, with all their workers, that the empty cluster could train at once. A worker needs one node."""
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    gpu = any(node.get("GPU") for node in nodes) if settings.gpu == "auto" else settings.gpu
    needed = {"CPU": settings.cpus_per_worker, **({"GPU": 1} if gpu else {})}
    workers = sum(min(int(node.get(kind, 0) // count) for kind, count in needed.items()) for node in nodes)
    return workers // settings.most_workers


def run_tasks(function: Callable[[ItemT], ResultT], items: Iterable[ItemT], *, in_process: bool) -> Iterator[ResultT]:
    """Yields `function(item)` of every item in the order of completion, from Ray tasks of one core each or in process.

    Ray restarts a task whose worker or node dies, so `function` must be safe to run again. Its errors are raised here.
    After an error, or if the caller stops iterating, the running tasks are cancelled.
    Raises: ClusterError if the cluster does not answer.
    """
    if in_process:
        yield from map(function, items)
        return
    connect()
    import ray
    from ray.exceptions import RayTaskError

    @ray.remote
    def task(item: Any) -> ResultT:  # `function` may be a partial, which Ray does not accept
        return function(item)

    max_in_flight = _MAX_TASKS_PER_CPU * max(1, int(ray.cluster_resources().get("CPU", 1)))
    remaining, running = iter(items), []
    try:
        while True:
            running += [task.remote(item) for item in itertools.islice(remaining, max_in_flight - len(running))]
            if not running:
                return
            finished, running = ray.wait(running)
            try:
                (result,) = ray.get(finished)
            except RayTaskError as error:  # Ray's own class hides the type of the error
                raise error.cause from None
            yield result
    finally:
        for reference in running:
            ray.cancel(reference)


def _start_local_cluster(cpus: int) -> str:
    """Starts a head node for this process and its children. It always ends with this process. Returns its address."""
    # Ray listens on every interface, even with 127.0.0.1, so clients need this token, which child processes inherit.
    # Ray reads the mode once, on import: a process that has already imported Ray keeps that mode.
    if "ray" in sys.modules:
        os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    else:
        os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))
    import ray

    # Some processes of Ray look up the cluster in this folder, which clusters of one machine share by default. In the
    # folder of another cluster, Ray Train would find no sign of a training and end it.
    os.environ["RAY_TMPDIR"] = tempfile.mkdtemp(prefix="ray-", dir=os.environ.get("RAY_TMPDIR"))
    name, value = _OMP_PASSIVE
    if set_here := name not in os.environ:
        os.environ[name] = value
    ray.init(
        address="local",
        num_cpus=max(cpus, os.cpu_count() or 1),
        object_store_memory=_OBJECT_STORE_BYTES,
        include_dashboard=False,
        log_to_driver=False,  # the driver logs what matters; the rest is in Ray's own log files
        logging_level=logging.WARNING,
    )
    if set_here:
        del os.environ[name]
    return ray.get_runtime_context().gcs_address


def check_address(address: str) -> None:
    """Checks that the address answers: `ray.init` itself would wait for 15 minutes. Raises: ClusterError."""
    if address in ("auto", "local"):
        return
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=PROBE_S):
            return
    except (OSError, ValueError, OverflowError) as error:
        raise ClusterError(
            f"RAY_ADDRESS={address} does not answer: {error}; start that cluster, or unset RAY_ADDRESS for a local one"
        ) from None
