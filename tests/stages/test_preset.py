"""Presets: each is a valid experiment, and taking one loses nothing."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from pipeline.base import config
from pipeline.base.errors import ConfigError
from stages import preset, seeds

ROOT = Path(__file__).resolve().parents[2]

PRESETS = sorted((ROOT / "presets").glob("*.yaml"))


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with the committed params.yaml and the presets, as the working directory."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(ROOT / "params.yaml", "params.yaml")
    shutil.copytree(ROOT / "presets", "presets")
    for command in (("init",), ("add", "."), ("-c", "user.name=a", "-c", "user.email=a@b", "commit", "-m", "all")):
        subprocess.run(["git", *command], check=True, capture_output=True)
    return tmp_path


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_presets_are_valid_experiments(path):
    assert config.load_experiment(path).models


def test_preset_becomes_the_experiment_with_its_source(clone):
    preset.run("imagenette", "~/photos")
    assert config.load_experiment().data.source == str(Path.home() / "photos")
    preset.run("imagenette", "s3://bucket/shards")
    assert config.load_experiment().data.source == "s3://bucket/shards"
    preset.run("imagenette")
    assert Path("params.yaml").read_bytes() == Path("presets/imagenette.yaml").read_bytes()


def test_a_preset_with_seeds_is_taken_again_and_keeps_added_ones(clone):
    preset.run("fashion")
    assert "e-vit-seed2" in config.load_experiment().models
    seeds.add_seeds(["e-vit"], [3])
    preset.run("fashion")
    assert {"e-vit-seed2", "e-vit-seed3"} <= config.load_experiment().models.keys()
    preset.run("imagenette")
    assert "e-vit-seed2" not in config.load_experiment().models


def test_a_preset_without_one_of_its_seeds_has_changes(clone):
    params = Path("presets/fashion.yaml").read_text()
    entry = params[params.index("  vit-seed1:") : params.index("  vit-seed2:")]
    Path("params.yaml").write_text(params.replace(entry, ""))
    with pytest.raises(ConfigError, match="commit or move them first"):
        preset.run("imagenette")


def test_changes_of_ones_own_are_not_overwritten(clone):
    params = Path("params.yaml")
    params.write_text(params.read_text().replace("seed: 0", "seed: 7", 1))
    with pytest.raises(ConfigError, match="commit or move them first"):
        preset.run("imagenette", "photos")
    assert config.load_experiment().seed == 7


def test_unknown_preset_names_the_nearest(clone):
    with pytest.raises(ConfigError, match="no preset named 'imagenete'; did you mean 'imagenette'"):
        preset.run("imagenete")
