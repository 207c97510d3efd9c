"""What every test shares: no network, no telemetry, few threads, small inputs."""

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
    "DVC_NO_ANALYTICS": "1",
    "MPLBACKEND": "agg",
}
os.environ.pop("RAY_ADDRESS", None)
os.environ.pop("MLFLOW_TRACKING_URI", None)

import ipaddress
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
import torch

# The same examples every time, however slow the machine; `--hypothesis-profile default` looks for new ones.
hypothesis.settings.load_profile("ci")

ROOT = Path(__file__).resolve().parent.parent


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
        sys.modules["ray"].shutdown()


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
