"""Ray clusters: attaching to the one that RAY_ADDRESS names, or one of our own on this machine."""

from __future__ import annotations

import itertools
import logging
import os
import secrets
import socket
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from pipeline.config import Train

Item = TypeVar("Item")
Result = TypeVar("Result")

PROBE_S = 5.0
_TASKS_PER_CPU = 2  # in flight: one runs, the next one waits with its arguments there
_OBJECT_STORE_BYTES = 200_000_000  # nothing large goes through it: images are read from the shards

# Read by Ray's processes and by the driver; a value that the user has set stays.
_DEFAULTS = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",  # start-up of a run 24 s -> 18 s on 2 cores
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # workers without a GPU: as Ray will have it, without its warning
}
# Of the workers of a cluster of our own, whose cores are all busy: on 2 of these, 2 threads that spin reach 51 to 414
# images/s, threads that sleep 550 to 850. Where cores are idle and throughput is measured, sleeping costs half of it.
_SLEEPING = ("OMP_WAIT_POLICY", "PASSIVE")


class ClusterError(RuntimeError):
    """The Ray cluster is not there or has too little; the message says what to do."""


def connect(cpus: int = 1) -> None:
    """Attaches this process to the cluster of RAY_ADDRESS, or else starts one that ends with this process.

    Args:
        cpus: cores that a cluster of our own must offer at least.
    Raises: ClusterError within 15 s when RAY_ADDRESS does not answer.
    """
    os.environ.update({**_DEFAULTS, **os.environ})
    address = os.environ.get("RAY_ADDRESS", "local")
    if "ray" in sys.modules and sys.modules["ray"].is_initialized():
        return
    if address == "local":
        _start(cpus)
        return
    probe(address)
    import ray

    ray.init(log_to_driver=False, logging_level=logging.WARNING)


@contextmanager
def local(cpus: int = 1) -> Iterator[None]:
    """One local cluster for everything started inside, by way of RAY_ADDRESS, unless that names one already."""
    if address := os.environ.get("RAY_ADDRESS"):
        probe(address)
        yield
        return
    before = dict(os.environ)
    os.environ.update({**_DEFAULTS, **os.environ})
    try:
        os.environ["RAY_ADDRESS"] = _start(cpus)
        yield
    finally:
        sys.modules["ray"].shutdown()
        os.environ.clear()
        os.environ.update(before)


def room(settings: Train) -> int:
    """Trainings with all their workers, each whole on a node, that the cluster could hold at once if it were empty."""
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    gpu = any(node.get("GPU") for node in nodes) if settings.gpu == "auto" else settings.gpu
    needed = {"CPU": settings.cpus_per_worker, **({"GPU": 1} if gpu else {})}
    workers = sum(min(int(node.get(kind, 0) // count) for kind, count in needed.items()) for node in nodes)
    return workers // settings.most_workers


def parallel(
    function: Callable[[Item], Result], items: Iterable[Item], *, in_process: bool
) -> Iterator[Result]:
    """`function` of every item, in the order in which they end: Ray tasks of one core each, or one after another here.

    A task whose worker or node dies is started again by Ray, so `function` must bear that. What it raises is
    raised here, and then, as when the iteration is left early, what is still under way is cancelled.
    Raises: ClusterError if the cluster does not answer.
    """
    if in_process:
        yield from map(function, items)
        return
    connect()
    import ray
    from ray.exceptions import RayTaskError

    @ray.remote
    def task(item: Any) -> Result:  # as a partial, which `function` may be, is no function for Ray
        return function(item)

    at_most = _TASKS_PER_CPU * max(1, int(ray.cluster_resources().get("CPU", 1)))
    left, running = iter(items), []
    try:
        while True:
            running += [task.remote(item) for item in itertools.islice(left, at_most - len(running))]
            if not running:
                return
            ended, running = ray.wait(running)
            try:
                (result,) = ray.get(ended)
            except RayTaskError as error:  # Ray's own class hides whose error it is
                raise error.cause from None
            yield result
    finally:
        for reference in running:
            ray.cancel(reference)


def _start(cpus: int) -> str:
    """Starts a head for this process and its children; it ends with this process, however that ends."""
    # Ray listens on every interface, even told 127.0.0.1: only who inherits this token is let in. Ray reads the
    # mode once, when it is imported; a process that has it already keeps the mode it was imported with.
    if "ray" in sys.modules:
        os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    else:
        os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))
    import ray

    name, value = _SLEEPING
    if is_ours := name not in os.environ:
        os.environ[name] = value
    ray.init(
        address="local",
        num_cpus=max(cpus, os.cpu_count() or 1),
        object_store_memory=_OBJECT_STORE_BYTES,
        include_dashboard=False,
        log_to_driver=False,  # the driver tells what there is to tell; the rest is in Ray's own log files
        logging_level=logging.WARNING,
    )
    if is_ours:
        del os.environ[name]
    return ray.get_runtime_context().gcs_address


def probe(address: str) -> None:
    """Asks whether anything listens there: `ray.init` itself would wait for a quarter of an hour."""
    if address in ("auto", "local"):
        return
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=PROBE_S):
            return
    except (OSError, ValueError, OverflowError) as error:
        raise ClusterError(
            f"RAY_ADDRESS={address} does not answer: {error}; "
            "start that cluster, or unset RAY_ADDRESS for a local one"
        ) from None
