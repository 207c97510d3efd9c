"""A tiny study from its trainings to its table: run again it trains nothing, and says what diverged."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from mlflow import MlflowClient

from pipeline import track
from pipeline.base import config
from pipeline.base.errors import ConfigError
from pipeline.base.yaml_files import dump_yaml, read_yaml
from pipeline.packing import pack
from pipeline.packing.sources import digits
from stages import scaling
from tests.conftest import ray_cluster

X, E = "deit3_small_patch16_224", "flop_deit3_small_patch16_224"


@pytest.fixture
def study_folder(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the digits and a study of three arms in two sizes, one of which diverges."""
    monkeypatch.chdir(tmp_path)
    params = read_yaml(root / "params.yaml")
    params["scaling"] |= {
        "arms": {
            "x": {"model": X},
            "e": {"model": E, "transpose": True},
            "hot": {"model": X, "recipe": {"lr": 1e38, "clip_grad_norm": None}},
        },
        "args": {"img_size": 32, "patch_size": 16, "depth": 1},
        "sizes": {"w4": {"embed_dim": 4, "num_heads": 1}, "w8": {"embed_dim": 8, "num_heads": 1}},
        "budgets": [2e8],
        "unique_images": {"fractions": [1.0, 0.1], "size": "w8", "budget": 2e8},
        "augmented": None,
        "bootstrap": 20,
    }
    Path("params.yaml").write_text(dump_yaml(params))
    experiment = config.load_experiment()
    digits.write_digits(Path(experiment.data.source))
    pack.pack_source(experiment.data.source, experiment.data.shards, images_per_shard=512, seed=0)
    return tmp_path


def read_rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "scaling/runs.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_a_study_that_has_ended_is_not_trained_again(study_folder):
    from pipeline.scaling import study

    experiment = config.load_experiment()
    with ray_cluster(num_cpus=2):
        study.run_study(experiment)
        files = {path: path.read_bytes() for path in sorted(Path("scaling").rglob("*")) if path.is_file()}
        trained = {path: path.stat().st_mtime_ns for path in Path("sweeps/trials/scaling").glob("*/epochs.jsonl")}
        shutil.rmtree("scaling")  # as DVC does before a stage
        study.run_study(experiment)
    rows = read_rows(study_folder)
    assert [row["trial"] for row in rows] == [
        "x-w4-2e+08-seed0", "x-w8-2e+08-seed0", "e-w4-2e+08-seed0", "e-w8-2e+08-seed0", "hot-w4-2e+08-seed0",
        "hot-w8-2e+08-seed0", "x-w8-2e+08-0.1-seed0", "e-w8-2e+08-0.1-seed0", "hot-w8-2e+08-0.1-seed0",
    ]  # fmt: skip
    assert {row["arm"]: row["state"] for row in rows} == {"x": "finished", "e": "finished", "hot": "diverged"}
    for row in rows:
        assert float(row["compute"]) == 3 * int(row["flops_image"]) * int(row["images_seen"]) <= 2e8
        assert float(row["epochs"]) == int(row["images_seen"]) / int(row["unique_images"])
        assert (row["val_loss"] == "") == (row["state"] == "diverged") == ("loss nan" in row["message"])
        assert (row["val_loss_averaged"] == "") == (row["arm"] != "x")
    losses = pq.read_table("scaling/losses.parquet")
    assert losses.num_rows == 360 and "x-w4-2e+08-seed0/averaged" in losses.column_names
    assert losses["x-w4-2e+08-seed0"].to_numpy().mean() == pytest.approx(float(rows[0]["val_loss"]), rel=1e-6)

    assert {path: path.stat().st_mtime_ns for path in trained} == trained and len(trained) == 6
    assert {path: path.read_bytes() for path in files} == files

    client = MlflowClient(track.tracking_uri())
    found = client.search_runs([client.get_experiment_by_name(experiment.tracking.experiment).experiment_id])
    parents = [run for run in found if run.info.run_name == "scaling"]
    assert [run.data.metrics["trials/diverged"] for run in parents] == [3, 3]
    nested = {run.info.run_name: run for run in found if "mlflow.parentRunId" in run.data.tags}
    assert set(nested) == {row["trial"] for row in rows}
    assert nested["x-w4-2e+08-seed0"].data.metrics["val/loss"] == pytest.approx(float(rows[0]["val_loss"]))
    assert nested["x-w4-2e+08-seed0"].data.metrics["scaling/compute"] == float(rows[0]["compute"])


def test_an_experiment_without_a_study_writes_an_empty_one(root, tmp_path, monkeypatch):
    from pipeline.scaling import study

    experiment = config.load_experiment(root / "params.yaml").model_copy(update={"scaling": None})
    monkeypatch.chdir(tmp_path)
    study.run_study(experiment)
    assert [path.name for path in Path("scaling").iterdir()] == ["study.json"]


def test_only_a_study_can_be_refitted(tmp_path):
    with pytest.raises(ConfigError, match="runs.csv not found"):
        scaling.run("--refit", str(tmp_path))
