"""A worker outside Ray Train, as in a trial of one worker, and on machines that lack something."""

from __future__ import annotations

import ast
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.base import config
from pipeline.base.yaml_files import dump_yaml
from pipeline.packing import pack
from pipeline.packing.sources import digits
from pipeline.sweeps.trial import LocalContext, TrialDirectory
from pipeline.training import loop, report_log, trainer, worker
from pipeline.training.epoch_tracker import EpochTracker
from tests.conftest import params_with_runs

ROOT = Path(__file__).resolve().parents[2]


def test_only_the_context_asks_ray_train():
    """A trial of one worker has another context, and Ray Train refuses every question outside its own workers."""
    body = ast.parse(Path(worker.__file__).read_text()).body
    outside = [node for node in body if not (isinstance(node, ast.ClassDef) and node.name == "RayTrainContext")]
    names = {name.id for node in outside for name in ast.walk(node) if isinstance(name, ast.Name)}
    assert "batching" in names and not names & {"ray", "get_device"}


@pytest.mark.parametrize("visible", [True, False])
@pytest.mark.parametrize(("gpu", "device"), [(False, "cpu"), (True, "cuda")])
def test_a_trial_takes_a_gpu_only_if_it_has_one(gpu, device, visible, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: visible)
    assert LocalContext(TrialDirectory(tmp_path), gpu=gpu).device == torch.device(device)


class Context:
    rank, world_size, device = 0, 1, torch.device("cpu")

    def __init__(self) -> None:
        self.reports: list[dict[str, Any]] = []

    def report(self, metrics: dict[str, Any]) -> None:
        self.reports.append(metrics)


@pytest.mark.parametrize(("has_compiler", "compiled"), [(True, True), (False, False)])
def test_a_training_that_cannot_compile_says_so(has_compiler, compiled, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    params = params_with_runs("vit")
    params["train"] |= {"compile": True}
    Path("params.yaml").write_text(dump_yaml(params))
    experiment = config.load_experiment()
    digits.write_digits(Path(experiment.data.source))
    pack.pack_source(experiment.data.source, experiment.data.shards, images_per_shard=512, seed=0)
    monkeypatch.setattr(worker, "can_compile", lambda device: has_compiler)
    monkeypatch.setattr(loop, "fit", lambda *args, **settings: None)
    context = Context()
    outcome = worker.train_loop_per_worker(worker.WorkerTask(experiment, "vit", ".", "steps", "stop"), context)
    [start] = context.reports
    assert start["compiled"] is outcome["compiled"] is compiled
    with caplog.at_level(logging.WARNING):
        trainer._make_report_handler(experiment, "vit", EpochTracker("vit", lambda epochs, steps: None))(start)
    assert caplog.messages == ([] if compiled else [f"vit: {report_log.EAGER_WARNING}"])
