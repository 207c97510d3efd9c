"""What every test shares: no network, no telemetry, few threads, small inputs; clusters, ports, and a small study."""

from __future__ import annotations

import os

# Before torch, Ray or MLflow are imported, here and in the processes that tests start.
os.environ |= {
    "OMP_NUM_THREADS": "2",
    "OMP_WAIT_POLICY": "PASSIVE",  # threads that spin starve each other where cores are busy
    "HF_HUB_OFFLINE": "1",
    "DO_NOT_TRACK": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",  # Ray's workers yield to all other processes, and these machines are busy with tests
    "RAY_enable_worker_prestart": "0",  # Ray would start workers that no test uses
    "RAY_prestart_worker_first_driver": "0",
    "DVC_NO_ANALYTICS": "1",
    "MPLBACKEND": "agg",
}
os.environ.pop("RAY_ADDRESS", None)
os.environ.pop("MLFLOW_TRACKING_URI", None)

import gc
import ipaddress
import signal
import socket
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hypothesis
import pytest
import torch

if TYPE_CHECKING:
    from ray.cluster_utils import Cluster

# The same examples every time, however slow the machine; `--hypothesis-profile default` looks for new ones.
hypothesis.settings.load_profile("ci")

# A shell lets its background jobs, and what these start, ignore Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parent.parent


def params_with_runs(*run_names: str) -> dict[str, Any]:
    """The experiment with these runs, no sweep and no scaling study."""
    from pipeline.base.yaml_files import read_yaml

    params = read_yaml(ROOT / "params.yaml")
    params["models"] = {name: run for name, run in params["models"].items() if name in run_names}
    params["sweeps"]["recipe"] |= {"runs": [], "own_space": {}}
    params["scaling"] = None
    params["sweeps"] |= {"hybrid": {**params["sweeps"]["hybrid"], "runs": []}, "tuned": {}}
    return params


@contextmanager
def ray_cluster(**head: object) -> Iterator[Cluster]:
    """A cluster of one node, its `head`, to which this process is connected and those that it starts connect."""
    import ray
    from ray.cluster_utils import Cluster

    from pipeline.cluster import RAY_ENV_DEFAULTS, connect

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("RAY_TMPDIR", ray_tmpdir())
        for name, value in RAY_ENV_DEFAULTS.items():
            patch.setenv(name, value)
        # Without a port of its own, the head would test Ray's usual one, and leave a socket open where it is taken.
        cluster = Cluster(initialize_head=True, head_node_args={"dashboard_port": None, **head})
        patch.setenv("RAY_ADDRESS", cluster.address)
        connect()
        yield cluster
        ray.shutdown()
        cluster.shutdown()


def ray_tmpdir() -> str:
    """A new folder for a Ray cluster, as pipeline.cluster makes one; pytest's own paths are too long for sockets."""
    return tempfile.mkdtemp(prefix="ray-")


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def wait_for(happened: Callable[[], object], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refuses connections that leave this machine, whoever asks for them."""
    connect = socket.socket.connect

    def connect_nearby(self: socket.socket, address):
        if self.family in (socket.AF_INET, socket.AF_INET6) and not _is_nearby(address[0]):
            raise OSError(f"a test tried to reach {address[0]}")
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", connect_nearby)


def _is_nearby(host: str) -> bool:
    if host in ("localhost", socket.gethostname()):
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    return address.is_loopback or address.is_private


@pytest.fixture(autouse=True, scope="module")
def _no_ray_left() -> Iterator[None]:
    """What a module's tests start in this process, those of the next one do not train on."""
    yield
    if "ray" in sys.modules:
        with warnings.catch_warnings(action="ignore", category=ResourceWarning):  # Ray does not wait for its processes
            sys.modules["ray"].shutdown()
            gc.collect()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Every test draws the same random numbers, whichever tests ran before it."""
    torch.manual_seed(0)


@pytest.fixture
def root() -> Path:
    """The repository's root, from which stages run."""
    return ROOT


@pytest.fixture
def images() -> torch.Tensor:
    """Two random images, (2, 3, 32, 32), float64."""
    return torch.randn(2, 3, 32, 32, dtype=torch.float64)
