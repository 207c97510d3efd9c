"""Throughput of the runs: what is built and measured together, and what comes of a network that does not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from flopeq.measure import throughput as library
from pipeline.base import config
from pipeline.base.yaml_files import dump_yaml, read_yaml
from pipeline.evaluation import throughput
from pipeline.reporting.baselines import comparison_groups
from pipeline.reporting.speed import ratios_of_passes
from tests.conftest import ROOT

SHARED = {"vit": ["vit", "vit-tuned", "vit-again"], "e-vit": ["e-vit", "e-vit-tuned"]}


@pytest.fixture
def experiment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> config.Experiment:
    """The committed experiment with a second seed of a run, the same network symmetrized, and short measurements."""
    monkeypatch.chdir(tmp_path)
    params = read_yaml(ROOT / "params.yaml")
    params["models"] = {name: run for name, run in params["models"].items() if "convnext" not in name}
    params["models"]["vit-again"] = {**params["models"]["vit"], "seed": 1}
    params["symmetrized"] = {"vit-sym": {"weights_of": "vit-again", "group": "flop"}}
    params["throughput"] |= {"batch_size": 2, "warmup": 0, "runs": 2, "compile": False}
    params["train"]["gpu"] = False
    for name in ("vit-tuned", "e-vit-tuned"):
        params["models"][name]["recipe"] = "digits"  # not from a sweep, which has not run
    params["sweeps"]["tuned"] = {}
    Path("params.yaml").write_text(dump_yaml(params))
    return config.load_experiment()


def test_each_network_is_built_once_and_beside_what_it_is_compared_with(experiment, monkeypatch):
    built, alive, most = [], [], []

    class Small(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 1)
            alive.append(self.layer)
            most.append(len(alive))

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.layer(images.mean((2, 3)))

    def build(_: config.Experiment, name: str, *, num_classes: int) -> nn.Module:
        built.append(name)
        return Small()

    monkeypatch.setattr(throughput, "build_network", build)
    monkeypatch.setattr(library, "clear_caches", lambda device: alive.clear())
    measured = throughput.measure_networks(experiment, comparison_groups(experiment), num_classes=10)
    assert sorted(built) == ["e-resmlp", "e-vit", "h-vit", "resmlp", "vit", "vit-sym"]
    assert most == [1, 2, 3, 4, 1, 2]  # one family after the other
    assert measured.keys() == set(experiment.run_names)
    for first, names in SHARED.items():
        assert all(measured[name] == measured[first] for name in names)
    assert all(row["alternated"] and len(row["pass_s"]) == 2 and row["img_per_s"] > 0 for row in measured.values())
    assert measured["vit"]["pass_s"] != measured["e-vit"]["pass_s"]


def test_a_network_that_does_not_fit_is_a_row(experiment, monkeypatch):
    class TooLarge(nn.Module):
        def forward(self, images: torch.Tensor) -> Any:
            raise torch.OutOfMemoryError("CUDA out of memory")

    def build(_: config.Experiment, name: str, *, num_classes: int) -> nn.Module:
        return TooLarge() if name == "vit" else nn.Flatten()

    monkeypatch.setattr(throughput, "build_network", build)
    measured = throughput.measure_networks(experiment, comparison_groups(experiment), num_classes=10)
    vit, e_vit, resmlp = (measured[name] for name in ("vit", "e-vit", "resmlp"))
    assert vit.keys() == e_vit.keys()
    assert vit["img_per_s"] is None and vit["pass_s"] == [] and vit["device"] == "cpu"
    assert e_vit["img_per_s"] > 0 and not e_vit["alternated"]
    assert ratios_of_passes(e_vit, vit) == () == ratios_of_passes(e_vit, measured["h-vit"])
    assert len(ratios_of_passes(measured["e-resmlp"], resmlp)) == 2
