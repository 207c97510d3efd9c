"""The plan of an experiment: figures that follow from params.yaml, and nothing started."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

import flopeq
from flopeq.registry import MODELS
from pipeline import plan
from pipeline.base import config
from pipeline.base.config import Experiment
from pipeline.base.errors import ConfigError

PRESETS = Path(__file__).resolve().parent.parent / "presets"


@pytest.fixture(scope="module")
def imagenet() -> Experiment:
    return config.load_experiment(PRESETS / "imagenet.yaml")


@pytest.fixture
def away_from_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def only(experiment: Experiment, *names: str) -> Experiment:
    return experiment.model_copy(update={"models": {name: experiment.models[name] for name in names}})


def test_imagenet_preset_has_every_row_of_table_1(imagenet):
    trained = Counter(run.model for run in imagenet.models.values())
    rows = {row.model for row in flopeq.table1()}
    # resmlp_12_224 fixes its LayerScale, so ResMLP-T12 is built from the base model's name.
    assert rows - trained.keys() == {"resmlp_12_224"}
    assert trained["resmlp_base_24_224"] == 2
    hybrids = [run.model for run in imagenet.models.values() if MODELS[run.model].variant == "H"]
    assert len(hybrids) == 11 and len(imagenet.models) == 33


def test_plan_follows_from_the_recipe(imagenet, away_from_shards):
    small, tiny, hybrid = plan.estimate_runs(only(imagenet, "e-vit-s", "resmlp-t", "h-convnext-s"))
    assert small.steps == 400 * 625  # 1,281,167 images in batches of 2,048, the last one dropped
    assert small.images_per_worker == 256
    assert (round(small.params_m, 1), round(small.gflops, 1)) == (11.0, 2.6)
    assert small.gpu_hours == pytest.approx(250_000 * 2048 / (6565 / 3) / 3600)
    assert small.state_gib == pytest.approx(11_039_656 * 16 / 2**30)
    assert tiny.gpu_hours is None and round(tiny.params_m, 1) == 15.4  # the paper's model under another's name
    assert hybrid.steps == 300 * 312 and hybrid.gpu_hours is None
    assert hybrid.state_gib == pytest.approx(hybrid.params_m * 1e6 * 20 / 2**30)  # one more, the average


def test_plan_says_how_many_processes_must_decode_for_a_gpu(imagenet, away_from_shards):
    """10 processes of 356 to 406 images/s with an augmentation policy, and of 700 without one (docs/data.md)."""
    (small,) = plan.estimate_runs(only(imagenet, "e-vit-s"))
    assert small.loaders == 6  # 6565 / 3 images/s of training, at 380 with ThreeAugment
    (fast,) = plan.estimate_runs(only(imagenet, "e-vit-s"), img_per_s=4500)
    assert fast.loaders == 12 > imagenet.train.loader_workers
    bare = imagenet.recipes["vit-s"].model_copy(update={"auto_augment": None, "color_jitter": 0.0})
    plain = imagenet.model_copy(update={"recipes": {**imagenet.recipes, "vit-s": bare}})
    (bare_run,) = plan.estimate_runs(only(plain, "e-vit-s"), img_per_s=4500)
    assert bare_run.loaders == 7


def test_given_throughput_takes_the_papers_place(imagenet, away_from_shards):
    (row,) = plan.estimate_runs(only(imagenet, "h-convnext-s"), img_per_s=1000)
    assert row.gpu_hours == pytest.approx(300 * 312 * 4096 / 1000 / 3600)


def test_unknown_number_of_images_is_an_error(away_from_shards):
    experiment = config.load_experiment(PRESETS / "imagenette.yaml")
    with pytest.raises(ConfigError, match="manifest.json not found.*dvc repro shard"):
        next(plan.estimate_runs(experiment))
