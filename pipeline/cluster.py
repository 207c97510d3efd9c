"""Ray clusters: connects to the cluster of RAY_ADDRESS, or starts a local one."""

from __future__ import annotations

import itertools
import logging
import os
import re
import secrets
import socket
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from pipeline.base.schema import Train

ItemT = TypeVar("ItemT")

ResultT = TypeVar("ResultT")

PROBE_S = 5.0

_MAX_TASKS_PER_CPU = 2  # in flight: one runs, the next is queued with its arguments in place

_OBJECT_STORE_BYTES = 200_000_000  # small, because images are read from the shards

# Ray puts the path of Python into a command line for bash without quotes, and never reports the worker that fails.
_SHELL_SPECIAL = re.compile(r"[\s'\"\\&;$()<>|*?\[\]{}#!`~]")

_GCS_ARGUMENT = "--gcs-address="  # of Ray's processes

_SOCKET_PATH = (  # in the folder of a local cluster, with the longest process id
    "/ray-abcdefgh/ray/session_2026-01-31_23-59-59_123456_4194304/sockets/plasma_store"
)

_MAX_SOCKET_PATH = 107 if sys.platform.startswith("linux") else 103  # bytes

_NUM_GPUS = "FLOPEQ_LOCAL_CLUSTER_GPUS"
"""Environment variable with the number of GPUs of a `local_cluster`, for the processes that use it."""

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
    if "ray" in sys.modules and sys.modules["ray"].is_initialized():
        return
    check_ray()
    if (os.environ.get("RAY_ADDRESS") or "local") == "local":
        _start_local_cluster(cpus)
        return
    import ray

    ray.init(log_to_driver=False, logging_level=logging.WARNING)


@contextmanager
def local_cluster(cpus: int = 1) -> Iterator[None]:
    """Sets RAY_ADDRESS to a new local cluster within the context, unless RAY_ADDRESS is already set."""
    check_ray()
    if os.environ.get("RAY_ADDRESS"):
        yield
        return
    environment = dict(os.environ)
    os.environ.update({**RAY_ENV_DEFAULTS, **os.environ})
    try:
        os.environ["RAY_ADDRESS"] = _start_local_cluster(cpus)
        os.environ[_NUM_GPUS] = f"{sys.modules['ray'].cluster_resources().get('GPU', 0):.0f}"
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


def call_on_gpu(function: Callable[..., ResultT], *arguments: Any, settings: Train, **keywords: Any) -> ResultT:
    """Returns `function(*arguments, **keywords)`, from a Ray task with a GPU if the cluster has GPUs.

    Otherwise it is called in this process, which may have a GPU itself. Without RAY_ADDRESS, or on the cluster of a
    `local_cluster` without GPUs, Ray is not even imported. The task works in this process's directory, which must be
    on a disk that all nodes share. Ray repeats it if its node dies. Its errors are raised here.
    """
    if settings.gpu is False or not num_gpus():
        return function(*arguments, **keywords)
    import ray
    from ray.exceptions import RayTaskError

    folder = os.getcwd()

    @ray.remote(num_gpus=1, num_cpus=settings.cpus_per_worker)
    def task() -> ResultT:
        os.chdir(folder)
        return function(*arguments, **keywords)

    try:
        return ray.get(task.remote())
    except RayTaskError as error:  # Ray's own class hides the type of the error
        raise error.cause from None


def num_gpus() -> int:
    """Returns the number of GPUs of the cluster of RAY_ADDRESS; 0 without one."""
    if not _may_have_gpus():
        return 0
    connect()
    return int(sys.modules["ray"].cluster_resources().get("GPU", 0))


def _may_have_gpus() -> bool:
    """Whether the cluster of RAY_ADDRESS may have GPUs, as far as that is known without Ray."""
    address = os.environ.get("RAY_ADDRESS") or "local"
    return address != "local" and os.environ.get(_NUM_GPUS, "") != "0"


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

    name, value = _OMP_PASSIVE
    # Some processes of Ray look up the cluster in this folder, which clusters of one machine share by default. In the
    # folder of another cluster, Ray Train would find no sign of a training and end it.
    folder = tempfile.mkdtemp(prefix="ray-", dir=_ray_temp_dir()[1])
    with _variables({name: os.environ.get(name, value), "RAY_TMPDIR": folder}):  # which Ray's processes inherit
        ray.init(
            address="local",
            num_cpus=max(cpus, os.cpu_count() or 1),
            object_store_memory=_OBJECT_STORE_BYTES,
            include_dashboard=False,
            log_to_driver=False,  # the driver logs what matters; the rest is in Ray's own log files
            logging_level=logging.WARNING,
        )
    return ray.get_runtime_context().gcs_address


@contextmanager
def _variables(values: Mapping[str, str]) -> Iterator[None]:
    """Sets environment variables within the context."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def check_ray() -> None:
    """Checks that the cluster of RAY_ADDRESS answers, or that a local one could start. Imports no Ray.

    Raises: ClusterError within 15 s, with what to do. Ray itself would wait for minutes or raise a traceback.
    """
    address = os.environ.get("RAY_ADDRESS") or "local"
    if address == "local":
        _check_sockets_folder()
    else:
        check_address(address)
    if match := _SHELL_SPECIAL.search(sys.executable):
        raise ClusterError(
            f"{sys.executable} has {match[0]!r} in its path, with which Ray cannot start workers: move this folder to "
            f"a path without spaces and characters that a shell interprets"
        )


def check_address(address: str) -> None:
    """Checks that the address answers: `ray.init` itself would wait for 15 minutes. Raises: ClusterError."""
    if address == "local":
        return
    resolved = _running_cluster() if address == "auto" else address
    if resolved is None:
        raise ClusterError(
            "RAY_ADDRESS=auto: no Ray cluster runs on this machine: start one with `ray start --head`, or unset "
            "RAY_ADDRESS for a local one"
        )
    host, _, port = resolved.removeprefix("ray://").rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=PROBE_S):
            return
    except (OSError, ValueError, OverflowError) as error:
        found = f" (found {resolved})" if address == "auto" else ""
        raise ClusterError(
            f"RAY_ADDRESS={address}{found} does not answer: {error}; start that cluster, or unset RAY_ADDRESS for a "
            f"local one"
        ) from None


def _running_cluster() -> str | None:
    """Returns the address that Ray takes for `auto`: of a process on this machine, or of the last `ray start`."""
    import psutil

    for process in psutil.process_iter(["cmdline"]):
        for argument in process.info["cmdline"] or ():
            if argument.startswith(_GCS_ARGUMENT) and len(argument) > len(_GCS_ARGUMENT):
                return argument.removeprefix(_GCS_ARGUMENT)
    file = Path(_ray_temp_dir()[1], "ray", "ray_current_cluster")
    return file.read_text().strip() or None if file.is_file() else None


def _ray_temp_dir() -> tuple[str, str]:
    """Returns the variable that sets Ray's temporary folder, and the folder."""
    for name in ("RAY_TMPDIR", *(["TMPDIR"] if sys.platform.startswith("linux") else [])):
        if name in os.environ:
            return name, os.environ[name]
    return "the default", "/tmp"


def _check_sockets_folder() -> None:
    """Raises ClusterError if the paths of Ray's sockets would be longer than a socket's path may be."""
    name, folder = _ray_temp_dir()
    excess = len(f"{folder}{_SOCKET_PATH}".encode()) - _MAX_SOCKET_PATH
    if excess > 0:
        raise ClusterError(
            f"{name}={folder} is {excess} bytes too long for the sockets that Ray has there: set RAY_TMPDIR to a "
            f"shorter folder on this machine, such as /tmp"
        )
