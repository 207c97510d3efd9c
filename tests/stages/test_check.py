"""Wrong input is refused on the command line, with a message for people, before anything long starts."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.base.errors import ConfigError
from pipeline.base.yaml_files import dump_yaml, read_yaml
from stages import check

COMMITTED = Path(__file__).resolve().parents[2] / "params.yaml"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A working directory with the committed params.yaml and nothing else."""
    (tmp_path / "params.yaml").write_text(COMMITTED.read_text())
    return tmp_path


def stage(folder: Path, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Runs `python -m stages.<word> ...` in a folder."""
    return subprocess.run(
        [sys.executable, "-m", f"stages.{words[0]}", *words[1:]],
        cwd=folder, env=os.environ | {"PYTHONPATH": str(COMMITTED.parent)} | env,
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip


def change(folder: Path, value: object, *keys: str) -> None:
    """Sets the entry of params.yaml under the keys; None removes it."""
    path = folder / "params.yaml"
    params = read_yaml(path)
    section = params
    for key in keys[:-1]:
        section = section[key]
    if value is None:
        del section[keys[-1]]
    else:
        section[keys[-1]] = value
    path.write_text(dump_yaml(params))


def assert_refused(done: subprocess.CompletedProcess[str], *mentioned: str) -> None:
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert "\nerror: " in "\n" + done.stderr
    for part in mentioned:
        assert part in done.stderr


def test_committed_experiment_is_accepted(folder):
    done = stage(folder, "check")
    assert (done.returncode, done.stderr) == (0, "")


def test_unknown_model_is_refused_with_the_nearest_name(folder):
    change(folder, "flop_deit3_smal_patch16_224", "models", "e-vit", "model")
    done = stage(folder, "check")
    assert_refused(done, "models.e-vit: unknown model", "did you mean 'flop_deit3_small_patch16_224'?")


def test_unknown_model_argument_is_refused_with_the_nearest_name(folder):
    change(folder, 64, "models", "vit", "args", "embed_dims")
    assert_refused(stage(folder, "check"), "models.vit", "'embed_dims'", "did you mean 'embed_dim'?")


def test_width_that_cannot_be_halved_is_refused(folder):
    change(folder, 66, "models", "e-convnext", "args", "embed_dim")
    assert_refused(stage(folder, "check"), "models.e-convnext", "66", "multiple of 4")


@pytest.mark.parametrize(
    ("changes", "mentioned"),
    [
        ({"auto_augment": "4a"}, "auto_augment: timm has no policy '4a'"),
        ({"loss": "bce"}, "loss: bce"),
        ({"global_batch_size": 63}, "63 is not a multiple of mixup_group 16: use one of 3, 7, 9, 21, 63"),
        ({"mixup_group": 1, "mixup_alpha": 0.8}, "mixup_group must be even, not 1"),
        ({"mixup_group": 64}, "train.workers 2: a global batch of 64 in groups of 64 images has work for at most 1"),
        ({"mixup_group": 32, "repeated_augmentation": 3}, "several of the 3 copies of an image: use at most 21"),
        ({"epochs": 5}, "leave none of the 5 epochs for the decay"),
    ],
)
def test_a_recipe_that_cannot_run_is_refused(folder, changes, mentioned, monkeypatch):
    change(folder, 2, "train", "workers")
    for key, value in changes.items():
        change(folder, value, "recipes", "digits", key)
    monkeypatch.chdir(folder)
    with pytest.raises(ConfigError, match="params.yaml: recipes.digits: ") as refusal:
        check.run()
    assert mentioned in str(refusal.value)


def test_a_batch_that_cannot_make_the_global_one_names_those_that_can(folder, monkeypatch):
    change(folder, 24, "train", "batch_per_worker")
    monkeypatch.chdir(folder)
    with pytest.raises(ConfigError, match="batch_per_worker 24 .* mixup_group 16: take 16, 32, 64 or auto"):
        check.run()


@pytest.mark.parametrize(
    ("value", "keys", "mentioned"),
    [
        (1, ("recipes", "digits", "epoch"), "digits.epoch: unknown parameter; did you mean 'epochs'?"),
        (1, ("tran",), "tran: unknown parameter; did you mean 'train'?"),
        ("one", ("train", "workers"), "train.workers"),
        (-0.1, ("recipes", "digits", "lr"), "recipes.digits.lr"),
        (None, ("data", "image_size"), "data.image_size: missing"),
        ("digit", ("models", "vit", "recipe"), "no recipe named 'digit'; did you mean 'digits'?"),
    ],
)
def test_unknown_or_ill_typed_parameter_is_refused(folder, value, keys, mentioned):
    change(folder, value, *keys)
    assert_refused(stage(folder, "check"), "params.yaml", mentioned)


def test_repro_refuses_what_check_refuses(folder):
    change(folder, 1, "train", "worker")
    assert_refused(stage(folder, "repro"), "train.worker: unknown parameter; did you mean 'workers'?")


def test_missing_data_folder_is_named(folder):
    change(folder, "photos", "data", "name")
    change(folder, "data/source/photos", "data", "source")
    for command in ("check", "prepare"):
        assert_refused(stage(folder, command), "data/source/photos", "data.source")


@pytest.mark.parametrize("command", ["check", "repro"])
def test_dead_ray_address_is_refused_within_15_s(folder, command):
    with socket.socket() as reserved:  # bound and not listening: nobody answers there
        reserved.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{reserved.getsockname()[1]}"
        started = time.monotonic()
        done = stage(folder, command, RAY_ADDRESS=address)
        took_s = time.monotonic() - started
    assert_refused(done, f"RAY_ADDRESS={address} does not answer")
    assert took_s < 15


@pytest.mark.parametrize("harm", ["changed", "cut", "gone"])
def test_training_refuses_a_shard_that_does_not_match_its_manifest(folder, shards, harm):
    (folder / "data").symlink_to(shards.parent.parent)
    shard = shards / "train-000000.tar"
    intact = shard.read_bytes()
    try:
        if harm == "gone":
            shard.unlink()
        else:
            shard.write_bytes(intact[:-1024] if harm == "cut" else intact[:600] + b"\xff" + intact[601:])
        for command in ("train", "evaluate"):
            assert_refused(stage(folder, command, "vit"), "train-000000.tar")
    finally:
        shard.write_bytes(intact)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The digits' shards, made by the stages themselves."""
    folder = tmp_path_factory.mktemp("digits")
    (folder / "params.yaml").write_text(COMMITTED.read_text())
    for command in ("prepare", "shard"):
        done = stage(folder, command)
        assert done.returncode == 0, done.stderr
    return folder / "data" / "shards" / "digits"


def test_a_symmetrized_run_with_an_unknown_group_is_refused(folder, monkeypatch):
    change(folder, {"vit-sym": {"weights_of": "vit", "group": "flops"}}, "symmetrized")
    monkeypatch.chdir(folder)
    with pytest.raises(ConfigError, match="symmetrized.vit-sym.group: group 'flops' is unknown: use trivial, flop"):
        check.run()
