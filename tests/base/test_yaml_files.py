"""params.yaml and presets mean the same to flopeq, DVC and a reader of YAML 1.1, even after DVC has rewritten them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import yaml
from dvc.utils.hydra import apply_overrides

from pipeline.base import config
from pipeline.base.errors import ConfigError
from pipeline.base.yaml_files import dump_yaml, parse_yaml, read_yaml
from stages import preset, seeds

ROOT = Path(__file__).resolve().parents[2]

EXPERIMENTS = [ROOT / "params.yaml", *sorted((ROOT / "presets").glob("*.yaml"))]


@pytest.fixture(params=EXPERIMENTS, ids=lambda path: path.stem)
def experiment_file(request, tmp_path: Path) -> Path:
    """A copy of each experiment, in a folder of its own."""
    return Path(shutil.copy(request.param, tmp_path / "params.yaml"))


def test_an_override_by_dvc_leaves_a_valid_file_with_that_value(experiment_file):
    before = config.load_experiment(experiment_file)
    apply_overrides(str(experiment_file), ["train.workers=2"])  # what `dvc exp run -S` calls
    after = config.load_experiment(experiment_file)
    assert after.train.workers == 2
    assert after == before.model_copy(update={"train": before.train.model_copy(update={"workers": 2})})


def test_both_versions_of_yaml_read_the_same_values(experiment_file):
    assert yaml.safe_load(experiment_file.read_text()) == read_yaml(experiment_file)
    apply_overrides(str(experiment_file), ["train.workers=2"])
    assert yaml.safe_load(experiment_file.read_text()) == read_yaml(experiment_file)


@pytest.mark.parametrize(
    "name", ["vit", "e-vit", "e-vit-tuned"]
)  # the first, a middle and the last with these arguments
def test_an_override_of_one_run_changes_that_run_only(name, tmp_path):
    path = Path(shutil.copy(ROOT / "params.yaml", tmp_path))
    before = config.load_experiment(path).models
    apply_overrides(str(path), [f"models.{name}.args.init_values=0.05"])
    after = config.load_experiment(path).models
    assert {run for run in before if before[run] != after[run]} == {name}
    assert after[name].args == before[name].args | {"init_values": 0.05}


def test_an_override_of_one_recipe_changes_that_recipe_only(tmp_path):
    path = Path(shutil.copy(ROOT / "presets" / "imagenet.yaml", tmp_path / "params.yaml"))
    before = config.load_experiment(path).recipes
    apply_overrides(str(path), ["recipes.vit-s.epochs=7"])  # others are made from it
    after = config.load_experiment(path).recipes
    assert {name for name in before if before[name] != after[name]} == {"vit-s"} and after["vit-s"].epochs == 7


def test_a_section_shared_by_an_alias_is_refused_with_what_to_write(tmp_path):
    path = tmp_path / "params.yaml"
    path.write_text((ROOT / "params.yaml").read_text().replace("{<<: *vit}", "*vit", 1))
    with pytest.raises(ConfigError, match=r"models.e-vit.args is an alias of models.vit.args.*write \{<<: \*name\}"):
        config.load_experiment(path)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("off", "off"),
        ("yes", "yes"),
        ("1e-4", 1e-4),
        ("010", 10),
        ("0o10", 8),
        ("1:30", "1:30"),
        ("~", None),
        ("", None),
    ],
)
def test_yaml_1_2_is_read(text, value):
    assert parse_yaml(text, "") == value


@pytest.mark.parametrize(
    "value",
    ["off", "On", "y", "NO", "1:30", "-190:20:30.15", "1e-5", "010", "0b1", "1_000", "null", "~", "", "a: b", "#", "ü",
     "2026-01-01", "a\nb", True, None, 1e-5, 1e22, -0.0, 0.1, 10**20, float("inf"), [1, [2.5, "x"]], {"a": {"b": []}}],
    ids=repr,
)  # fmt: skip
@pytest.mark.parametrize("flow", [False, True])
def test_both_versions_of_yaml_read_what_is_written(value, flow):
    text = dump_yaml({"key": value}, flow=flow)
    assert parse_yaml(text, "") == yaml.safe_load(text) == {"key": value}
    assert not flow or text.count("\n") == 1


def test_a_section_used_twice_is_written_twice():
    args = {"depth": 3, "sizes": [1, 2]}
    text = dump_yaml({"vit": args, "e-vit": args})
    assert "*" not in text and parse_yaml(text, "") == {"vit": args, "e-vit": args}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"seed: 0\nseed: 1\n", "params.yaml is not valid YAML.*duplicate key"),
        (b"seed: [0\n", "params.yaml is not valid YAML"),
        ("name: ü".encode("latin-1"), "params.yaml is not UTF-8"),
    ],
)
def test_a_damaged_file_is_named(content, message, tmp_path):
    path = tmp_path / "params.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=f"(?s){message}"):
        read_yaml(path)


def test_files_with_a_byte_order_mark_and_windows_line_ends_are_read(tmp_path):
    path = tmp_path / "params.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + (ROOT / "params.yaml").read_bytes().replace(b"\n", b"\r\n"))
    assert config.load_experiment(path) == config.load_experiment(ROOT / "params.yaml")


def test_seeds_and_presets_know_a_file_that_dvc_has_rewritten(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "presets", "presets")
    shutil.copy("presets/imagenette.yaml", "params.yaml")
    assert seeds.add_seeds(["e-vit"], [1]) == ["e-vit-seed1"]
    apply_overrides("params.yaml", ["train.workers=1"])  # the value that it has, so only the layout changes
    rewritten = Path("params.yaml").read_text()
    assert rewritten != Path("presets/imagenette.yaml").read_text()
    assert seeds.add_seeds(["e-vit"], [1, 2]) == ["e-vit-seed1", "e-vit-seed2"]
    preset.run("imagenette")  # nothing to do: these are the preset and its seeds
    assert config.load_experiment().models.keys() > {"e-vit-seed1", "e-vit-seed2"}
    preset.run("imagenet", "/photos/ü 🐦")
    assert config.load_experiment().data.source == "/photos/ü 🐦"
    assert not Path("params.yaml.orig").exists()


def test_runs_are_added_only_to_a_block(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    params = read_yaml(ROOT / "params.yaml")
    Path("params.yaml").write_text(dump_yaml(params, flow=True))
    with pytest.raises(ConfigError, match="write `models` as a block"):
        seeds.add_seeds(["e-vit"], [1])
    assert read_yaml(Path("params.yaml")) == params
