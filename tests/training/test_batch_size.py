"""The number of images per forward pass: found as training runs, on a copy, and remembered."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from pipeline.base.config import load_experiment
from pipeline.base.errors import ConfigError
from pipeline.base.schema import Recipe
from pipeline.training import batch_size, worker
from pipeline.training.batch_size import SavedBatchSize, TrialStep
from tests.conftest import ROOT

CUDA = torch.device("cuda")

SEEN: list[int] = []


class Small(nn.Module):
    """Has memory for `room` images, and notes how many it is given."""

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room = room
        self.norm, self.head = nn.LayerNorm(3 * 4 * 4), nn.Linear(3 * 4 * 4, 5)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        SEEN.append(len(images))
        if len(images) > self.room:
            raise torch.OutOfMemoryError("no room")
        return self.head(self.norm(images.flatten(1)))


@pytest.fixture(autouse=True)
def _nothing_seen() -> None:
    SEEN.clear()


@pytest.fixture
def recipe() -> Recipe:
    return load_experiment(ROOT / "params.yaml").recipes["digits"]


def largest(model: Small, recipe: Recipe, sizes: list[int], **settings: Any) -> int:
    step = TrialStep(recipe, 4, 5, torch.device("cpu"), **settings)
    return batch_size.find_max_batch_size(model, step, sizes)


@pytest.mark.parametrize(
    ("share", "group", "sizes"),
    [
        (1024, 128, [1024, 512, 256, 128]),
        (128, 128, [128]),
        (96, 16, [96, 64, 32, 16]),
        (688, 16, [688, 512, 256, 128, 64, 32, 16]),
    ],
)
def test_sizes_are_whole_groups_from_the_whole_share_down(share, group, sizes):
    assert batch_size.candidate_batch_sizes(share, group) == sizes
    assert all(size % group == 0 for size in sizes)


@pytest.mark.parametrize(("room", "found"), [(1000, 64), (64, 64), (63, 32), (33, 32), (16, 16)])
def test_the_largest_size_that_fits_is_found_and_nothing_smaller_tried(recipe, room, found):
    assert largest(Small(room), recipe, [64, 32, 16]) == found
    assert [*(size for size in (64, 32, 16) if size > found), found, found] == SEEN  # two steps where one fits


@pytest.mark.parametrize("optimizer", ["adamw", "lamb"])
def test_finding_a_batch_size_changes_no_weight_and_leaves_no_gradient(recipe, optimizer):
    model = Small(32)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    largest(model, recipe.model_copy(update={"optimizer": optimizer}), [64, 32])
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_group_that_does_not_fit_is_an_error_that_says_what_to_change(recipe):
    with pytest.raises(ConfigError, match="a batch of 16 images does not fit .* smaller mixup_group"):
        largest(Small(15), recipe, [64, 32, 16])


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_step_is_tried_as_training_runs_it(recipe, compile, world_size, monkeypatch):
    """With its average, compiled if training is, and with DistributedDataParallel's buckets if there are workers."""
    compiled, allocated = [], []
    empty_like = torch.empty_like
    monkeypatch.setattr(torch, "compile", lambda model: compiled.append(model) or model)
    monkeypatch.setattr(torch, "empty_like", lambda made: allocated.append(tuple(made.shape)) or empty_like(made))
    model, averaged = Small(8), []
    monkeypatch.setattr(batch_size.recipes, "build_ema", lambda recipe, model: averaged.append(model))
    largest(model, recipe, [8], compile=compile, world_size=world_size)
    [copied] = averaged
    assert copied is not model and compiled == [copied] * compile
    buckets = [tuple(parameter.shape) for parameter in model.parameters()] if world_size > 1 else []
    assert allocated == [*buckets, (8, 3, 4, 4)]


def gpu(monkeypatch: pytest.MonkeyPatch, name: str = "NVIDIA A100", gib: int = 40) -> None:
    properties = SimpleNamespace(name=name, total_memory=gib << 30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)


@pytest.mark.parametrize("storage", ["folder", "url"])
def test_a_size_is_remembered_for_the_same_conditions(recipe, storage, tmp_path: Path, monkeypatch):
    location = str(tmp_path / "5e1f" / "steps") if storage == "folder" else f"file://{tmp_path}/5e1f/steps"
    (tmp_path / "5e1f").mkdir()
    gpu(monkeypatch)
    step = TrialStep(recipe, 4, 5, CUDA)
    assert SavedBatchSize(location, step).load() is None
    SavedBatchSize(location, step).save(48)
    assert SavedBatchSize(location, step).load() == 48
    assert json.loads((tmp_path / "5e1f/batch_size.json").read_text())["batch_size"] == 48
    assert SavedBatchSize(location, TrialStep(recipe, 4, 5, CUDA, world_size=2)).load() is None
    assert SavedBatchSize(location, TrialStep(recipe, 4, 5, CUDA, compile=True)).load() is None
    gpu(monkeypatch, gib=80)
    assert SavedBatchSize(location, step).load() is None


def test_a_restarted_worker_does_not_search_again_nor_outside_ray_train(tmp_path: Path, monkeypatch):
    gpu(monkeypatch)
    tried = []

    def find(model: nn.Module, step: TrialStep, sizes: list[int]) -> int:
        tried.append(sizes)
        return sizes[1]

    monkeypatch.setattr(batch_size, "find_max_batch_size", find)
    experiment = load_experiment(ROOT / "params.yaml")
    task = worker.WorkerTask(experiment, "vit", ".", str(tmp_path / "steps"), "stop")
    step = TrialStep(experiment.recipe("vit"), 32, 10, CUDA)
    for _ in range(2):
        assert worker._microbatch_size(task, nn.Linear(1, 1), step, rank=0) == 32
    assert tried == [[64, 32, 16]]
    on_cpu = TrialStep(experiment.recipe("vit"), 32, 10, torch.device("cpu"))
    assert worker._microbatch_size(task, nn.Linear(1, 1), on_cpu, rank=0) == 64


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_size_that_was_found_trains_and_leaves_the_gpu_empty(recipe):
    model, before = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 5)), torch.cuda.memory_allocated()
    step = TrialStep(recipe, 32, 5, CUDA, amp="bf16", compile=True, world_size=2)
    assert batch_size.find_max_batch_size(model, step, [1 << 26, 64]) == 64
    assert torch.cuda.memory_allocated() == before
