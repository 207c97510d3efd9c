"""Runs of further seeds."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from pipeline.base import config
from pipeline.base.errors import ConfigError
from pipeline.base.yaml_files import parse_yaml
from stages import preset, seeds

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def experiment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for path in ("params.yaml", "presets/imagenet.yaml"):
        Path(path).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / path, path)
    return tmp_path


def test_adding_seeds_twice_adds_runs_once(experiment):
    before = Path("params.yaml").read_text()
    names = seeds.add_seeds(["e-vit", "vit"], [0, 1, 2])
    assert names == ["e-vit", "e-vit-seed1", "e-vit-seed2", "vit", "vit-seed1", "vit-seed2"]
    loaded = config.load_experiment()
    for name in names:
        base = loaded.run(name.partition("-seed")[0])
        assert loaded.run(name).model_copy(update={"seed": None}) == base
    assert [loaded.seed_of(name) for name in names] == [0, 1, 2, 0, 1, 2]
    after = Path("params.yaml").read_text()
    assert seeds.add_seeds(["e-vit", "vit"], [0, 1, 2]) == names and Path("params.yaml").read_text() == after
    assert "".join(line for line in after.splitlines(True) if "-seed" not in line) == before  # comments and all
    assert seeds.without_seed_runs(parse_yaml(after, "")) == parse_yaml(before, "")


def test_seeds_of_no_run_or_under_a_taken_name_are_refused(experiment):
    with pytest.raises(ConfigError, match="RUNS=e-vit SEEDS="):
        seeds.add_seeds([], [1])
    with pytest.raises(ConfigError, match="no run named 'evit'"):
        seeds.add_seeds(["evit"], [1])
    seeds.add_seeds(["vit"], [1])
    Path("params.yaml").write_text(Path("params.yaml").read_text().replace("seed: 1}", "seed: 4}"))
    with pytest.raises(ConfigError, match="vit-seed1 is not vit with seed 1"):
        seeds.add_seeds(["vit"], [1])


def test_a_preset_named_again_keeps_its_seeds(experiment):
    shutil.copy("presets/imagenet.yaml", "params.yaml")
    seeds.add_seeds(["e-vit-s"], [1])
    with_seed = Path("params.yaml").read_text()
    preset.run("imagenet")
    assert Path("params.yaml").read_text() == with_seed
    preset.run("imagenet", "/elsewhere")  # nothing of one's own is lost by another source
    assert config.load_experiment().data.source == "/elsewhere"


def test_a_run_and_its_symmetrized_runs_get_the_same_seeds(experiment):
    text = Path("params.yaml").read_text()
    rows = "symmetrized:\n  vit-sym: {weights_of: vit, group: flop, how: choose}\n"
    Path("params.yaml").write_text(re.sub(r"symmetrized:.*\n", rows, text))
    before = Path("params.yaml").read_text()
    assert seeds.add_seeds(["vit-sym"], [0, 1]) == ["vit-sym", "vit-sym-seed1"]
    assert seeds.add_seeds(["vit"], [2]) == ["vit-seed2"]
    loaded = config.load_experiment()
    assert [*loaded.symmetrized] == ["vit-sym", "vit-sym-seed1", "vit-sym-seed2"]
    assert [loaded.seed_of(name) for name in loaded.symmetrized] == [0, 1, 2]
    assert loaded.symmetrized["vit-sym-seed2"].weights_of == "vit-seed2"
    assert {run.how for run in loaded.symmetrized.values()} == {"choose"}
    assert seeds.without_seed_runs(parse_yaml(Path("params.yaml").read_text(), "")) == parse_yaml(before, "")
