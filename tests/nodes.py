"""A Ray cluster in this process's keeping, whose workers can import the repository and its tests."""

from __future__ import annotations

import gc
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster

from pipeline.cluster import _DEFAULTS, connect

ROOT = Path(__file__).resolve().parent.parent


@contextmanager
def a_cluster(**head: object) -> Iterator[Cluster]:
    """A cluster of one node, its `head`, to which this process is connected and those that it starts connect."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{ROOT / 'tests'}")
        patch.setenv("RAY_AUTH_MODE", "disabled")
        for name, value in _DEFAULTS.items():
            patch.setenv(name, value)
        cluster = Cluster(initialize_head=True, head_node_args=head)
        patch.setenv("RAY_ADDRESS", cluster.address)
        connect()
        yield cluster
        ray.shutdown()
        cluster.shutdown()
        with warnings.catch_warnings(action="ignore", category=ResourceWarning):  # sockets that Ray leaves open
            del cluster
            gc.collect()
