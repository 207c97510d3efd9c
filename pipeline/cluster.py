"""Ray clusters: attaching to the one that RAY_ADDRESS names, or one of our own on this machine."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager

PROBE_S = 5.0
_OBJECT_STORE_BYTES = 200_000_000  # nothing large goes through it: images are read from the shards

# Read by Ray's processes when they start, and by the driver. A value that the user has set stays.
_QUIET_AND_QUICK = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",  # start-up of a run 24 s -> 18 s on 2 cores
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DEDUP_LOGS": "0",
}


class ClusterError(RuntimeError):
    """The Ray cluster is not there or has too little; the message says what to do."""


def connect(cpus: int = 1) -> None:
    """Attaches this process to the cluster of RAY_ADDRESS, or else starts one that ends with this process.

    Args:
        cpus: cores that a cluster of our own must offer at least.
    Raises: ClusterError within 15 s when RAY_ADDRESS does not answer.
    """
    import ray

    if ray.is_initialized():
        return
    os.environ.update({**_QUIET_AND_QUICK, **os.environ})
    if os.environ.get("RAY_ADDRESS", "local") == "local":
        _start(cpus)
    else:
        probe(os.environ["RAY_ADDRESS"])
        ray.init(logging_level=logging.WARNING)


@contextmanager
def local(cpus: int = 1) -> Iterator[None]:
    """One local cluster for everything started inside, by way of RAY_ADDRESS, unless that names one already."""
    if "RAY_ADDRESS" in os.environ:
        probe(os.environ["RAY_ADDRESS"])
        yield
        return
    import ray

    before = dict(os.environ)
    os.environ.update({**_QUIET_AND_QUICK, **os.environ})
    try:
        os.environ["RAY_ADDRESS"] = _start(cpus)
        yield
    finally:
        ray.shutdown()
        os.environ.clear()
        os.environ.update(before)


def _start(cpus: int) -> str:
    """Starts a head on the loopback interface; its processes end with this one, however this one ends."""
    import ray

    # A cluster of one user on one machine: a token left by another cluster must not lock it.
    os.environ["RAY_AUTH_MODE"] = "disabled"
    context = ray.init(
        address="local",
        num_cpus=max(cpus, os.cpu_count() or 1),
        object_store_memory=_OBJECT_STORE_BYTES,
        include_dashboard=False,
        logging_level=logging.WARNING,
        _node_ip_address="127.0.0.1",
    )
    return context.address_info["gcs_address"]


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
