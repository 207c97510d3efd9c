"""Where stages compute: on a GPU of the cluster if it has any, else in their own process, without Ray."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from pipeline import cluster
from pipeline.base import schema
from pipeline.base.errors import ConfigError
from pipeline.base.yaml_files import read_yaml
from tests.conftest import ROOT, ray_cluster


def settings(**changes: object) -> schema.Train:
    return schema.Train.model_validate({**read_yaml(ROOT / "params.yaml")["train"], **changes})


def where(number: int, *, unit: str) -> tuple[int, str, str, str | None]:
    return os.getpid(), os.getcwd(), f"{number} {unit}", os.environ.get("CUDA_VISIBLE_DEVICES")


def fail() -> None:
    raise ConfigError("no such image")


@pytest.mark.parametrize(
    ("environment", "gpu"),
    [({}, "auto"), ({"RAY_ADDRESS": "local"}, "auto"), ({"RAY_ADDRESS": "10.0.0.1:6379"}, False),
     ({"RAY_ADDRESS": "127.0.0.1:1", "FLOPEQ_LOCAL_CLUSTER_GPUS": "0"}, "auto")],
)  # fmt: skip
def test_without_gpus_nothing_asks_ray(environment, gpu, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(cluster, "connect", None)  # a call would raise
    assert cluster.call_on_gpu(where, 3, unit="images", settings=settings(gpu=gpu))[:1] == (os.getpid(),)


@pytest.mark.slow
def test_a_task_has_a_gpu_of_the_cluster_and_the_directory_of_the_stage(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with ray_cluster(num_cpus=1, num_gpus=2):
        assert cluster.num_gpus() == 2
        process, folder, text, visible = cluster.call_on_gpu(where, 3, unit="images", settings=settings())
        assert process != os.getpid() and folder == str(tmp_path) and text == "3 images" and visible in ("0", "1")
        with pytest.raises(ConfigError, match="no such image"):
            cluster.call_on_gpu(fail, settings=settings())
        assert cluster.call_on_gpu(where, 3, unit="images", settings=settings(gpu=False))[0] == os.getpid()


@pytest.mark.parametrize(("resources", "may_have"), [({"CPU": 2.0}, False), ({"CPU": 2.0, "GPU": 8.0}, True)])
def test_a_local_cluster_says_how_many_gpus_it_has(resources, may_have, monkeypatch):
    ray = SimpleNamespace(cluster_resources=lambda: resources, shutdown=lambda: None)
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setattr(cluster, "_start_local_cluster", lambda cpus: "127.0.0.1:1")
    with cluster.local_cluster():
        assert cluster._may_have_gpus() is may_have
    assert not cluster._may_have_gpus() and "FLOPEQ_LOCAL_CLUSTER_GPUS" not in os.environ
