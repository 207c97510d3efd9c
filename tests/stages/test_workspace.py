"""Temporary workspaces of `dvc exp run` link the repository's shards, if these are what they would pack."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import Any

import pytest

from pipeline.base import config
from pipeline.base.yaml_files import dump_yaml, read_yaml, value_at
from pipeline.packing import pack
from pipeline.packing.sources import digits
from pipeline.shards import verify
from pipeline.shards.manifests import Shards
from stages import prepare, shard, workspace

ROOT = Path(__file__).resolve().parents[2]

SHARDS = Path("data/shards/digits")


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository whose stages `prepare` and `shard` have run."""
    folder = tmp_path_factory.mktemp("repository")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        shutil.copy(ROOT / "params.yaml", "params.yaml")
        prepare.run()
        shard.run()
        stage, params = read_yaml(ROOT / "dvc.yaml")["stages"]["shard"], read_yaml(Path("params.yaml"))
        entry = {
            "deps": [entry_of(Path("data/source.json"))],
            "params": {"params.yaml": {name: value_at(params, name) for name in stage["params"]}},
            "outs": [entry_of(SHARDS / "manifest.json")],
        }
        Path("dvc.lock").write_text(dump_yaml({"stages": {"shard": entry}}))
    return folder


def entry_of(path: Path) -> dict[str, str]:
    return {"path": path.as_posix(), "md5": hashlib.md5(path.read_bytes()).hexdigest()}


@pytest.fixture(params=["standalone/tmp1", "tmp1"])  # of --temp and of --queue
def temporary(request, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A temporary workspace of a copy of the repository, as DVC makes it, as the working directory."""
    repository = tmp_path / "repository"
    shutil.copytree(packed, repository)
    folder = repository / ".dvc/tmp/exps" / request.param
    (folder / "data").mkdir(parents=True)
    for name in ("params.yaml", "data/source.json"):
        shutil.copy(repository / name, folder / name)
    monkeypatch.chdir(folder)
    return repository


def test_shards_are_linked_and_not_packed_again(temporary, monkeypatch):
    monkeypatch.setattr(pack, "pack_source", None)  # a call would raise
    monkeypatch.setattr(digits, "open_source", None)  # the source may be gone
    shard.run()
    assert sorted(path.name for path in SHARDS.iterdir()) == sorted(
        path.name for path in (temporary / SHARDS).iterdir() if path.is_file()
    )
    assert (SHARDS / "train-000000.tar").is_symlink() and not (SHARDS / "manifest.json").is_symlink()
    verify.verify_changed(SHARDS)
    assert Shards(SHARDS).num_images("train") == Shards(temporary / SHARDS).num_images("train")


def change_params(repository: Path) -> None:
    params = read_yaml(Path("params.yaml"))
    params["data"]["images_per_shard"] = 100
    Path("params.yaml").write_text(dump_yaml(params))


def change_source(repository: Path) -> None:
    Path("data/source.json").write_text("{}")


def change_shards(repository: Path) -> None:
    (repository / SHARDS / "manifest.json").write_text("{}")


def forget(repository: Path) -> None:
    (repository / "dvc.lock").unlink()


@pytest.mark.parametrize("change", [change_params, change_source, change_shards, forget])
def test_shards_of_other_images_or_parameters_are_not_linked(change: Any, temporary):
    change(temporary)
    assert not workspace.link_shards(SHARDS) and not SHARDS.exists()


def test_a_repository_links_nothing(packed, tmp_path, monkeypatch):
    monkeypatch.chdir(packed)
    assert workspace.find_repository(packed) is None and not workspace.link_shards(Path("data/shards/other"))
    assert config.load_experiment().data.shards == SHARDS
