"""A study without trainings: the files that the stages before the report leave."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flopeq.registry import describe
from pipeline.base import config
from pipeline.base.yaml_files import dump_yaml
from pipeline.evaluation import predictions, statistics
from pipeline.reporting import run_results, table
from tests.conftest import params_with_runs

ROOT = Path(__file__).resolve().parents[2]


NUM_EPOCHS = 12


FLOPS = {"X": 2.2e6, "H": 1.7e6, "E": 1.2e6, "C2xC2": 0.7e6, "D4": 0.6e6, "graded": 0.9e6, "S": 4.4e6}


SPEED = {
    "X": 20_000.0,
    "H": 22_000.0,
    "E": 24_000.0,
    "C2xC2": 28_000.0,
    "D4": 30_000.0,
    "graded": 26_000.0,
    "S": 9_000.0,
}


SPEED_OF_PASSES = {variant: (0.9, 1.0, 1.1) for variant in SPEED} | {"E": (0.9, 1.0, 1.155)}
"""Times SPEED. The ratios of E to X in neighbouring passes are 1, 1 and 1.05 times the ratio of their speeds."""


TOP1 = {
    "vit": 98.6,
    "h-vit": 98.3,
    "e-vit": 96.1,
    "resmlp": 97.8,
    "e-resmlp": 97.2,
    "convnext": 98.9,
    "e-convnext": 98.6,
}


NUM_IMAGES = 1000
"""Validation images, so that every value of TOP1 is a number of hits."""


FAMILY_SCALE = {"vit": 1.0, "resmlp": 0.8, "convnext": 1.4}


@pytest.fixture(autouse=True, scope="module")
def _in_temp_dir(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No sweep that was run in the working directory gets into the reports made here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("elsewhere"))
        yield


def write_fake_study(
    folder: Path, changes: dict[str, Any] | None = None, symmetrized: dict[str, Any] | None = None
) -> config.Experiment:
    """A folder as the stages before the report leave it, of the committed experiment with TOP1's accuracies.

    `changes` are merged into the `models` section; None there removes the run. `symmetrized` is the section.
    """
    params = params_with_runs(*TOP1)
    params["models"] = {k: v for k, v in {**params["models"], **(changes or {})}.items() if v is not None}
    params["symmetrized"] = symmetrized or {}
    (folder / "params.yaml").write_text(dump_yaml(params))
    experiment = config.load_experiment(folder / "params.yaml")
    complexity, throughput = [], []
    for name in experiment.run_names:
        run = experiment.run(name)
        info = describe(run.model, run.args)
        variant = "S" if name in experiment.symmetrized else info.variant if info else "X"
        scale = FAMILY_SCALE.get(experiment.trained_name(name).split("-")[-1], 1.0)
        flops = int(FLOPS[variant] * scale)
        complexity.append(
            {
                "run": name,
                "model": run.model,
                "params": flops // 14,
                "flops": flops,
                "macs": int(flops * 0.9),
                "elementwise": int(flops * 0.1),
            }
        )
        throughput.append(
            {
                "run": name,
                "model": run.model,
                "device": "cpu",
                "dtype": "float32",
                "batch_size": 64,
                "img_per_s": SPEED[variant] / scale,
                "img_per_s_quartiles": [0.9 * SPEED[variant] / scale, 1.1 * SPEED[variant] / scale],
                "pass_s": [64 * scale / (factor * SPEED[variant]) for factor in SPEED_OF_PASSES[variant]],
                "peak_mem_mb": None,
                "compiled": True,
            }
        )
        _write_run(folder / "outputs" / name, TOP1.get(name, 97.0), invariant=variant not in ("X", "H"))
    (folder / "reports").mkdir()
    (folder / "reports/complexity.json").write_text(json.dumps(complexity))
    (folder / "reports/throughput.json").write_text(json.dumps(throughput))
    return experiment


def _write_run(folder: Path, top1: float, invariant: bool) -> None:
    folder.mkdir(parents=True)
    rows = [_epoch(epoch, top1) for epoch in range(NUM_EPOCHS)]
    _write_history(folder, rows)
    write_hits(folder, np.arange(NUM_IMAGES) < round(top1 * NUM_IMAGES / 100))
    write_json(folder / "run.json", run=folder.name, mlflow_run_id="0" * 32, fingerprint="f", status="finished")
    write_json(
        folder / "metrics.json",
        **{
            "val/top1_pct": top1,
            **top1_bounds(top1),
            "val/top5_pct": 99.9,
            "val/loss": 0.1,
            "val/flop_agreement_pct": 100.0 if invariant else 41.5,
            "equivariance/max_rel_error": 3.1e-7 if invariant else 0.83,
            "converged": True,
        },
    )


def top1_bounds(top1: float) -> dict[str, float]:
    low, high = statistics.wilson_interval(round(top1 * NUM_IMAGES / 100), NUM_IMAGES).scaled(100)
    return {"val/top1_low_pct": low, "val/top1_high_pct": high}


def write_hits(folder: Path, hits: np.ndarray, prefix: str = "val") -> None:
    """Writes the predictions of a run that gets these images right, all of class 1, and the others wrong."""
    keys = [f"{prefix}/{number}" for number in range(len(hits))]
    predictions.write_predictions(folder, keys, [1] * len(hits), hits.astype(int).tolist(), [0.5] * len(hits))


def _epoch(epoch: int, top1: float) -> dict[str, float]:
    learnt = 1 - math.exp(-(epoch + 1) / 3)
    return {
        "epoch": epoch,
        "lr": 1e-3,
        "train/loss": 2.3 - 1.7 * learnt,
        "val/loss": 2.2 - 2 * learnt,
        "val/top1_pct": 10 + (top1 - 10) * learnt,
        "val/top5_pct": 99.0,
        "perf/img_per_s": 900.0,
    }


def _write_history(folder: Path, rows: list[dict[str, float]]) -> None:
    with (folder / "history.csv").open("w", newline="") as lines:
        writer = csv.DictWriter(lines, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def write_json(path: Path, **content: Any) -> None:
    path.write_text(json.dumps(content))


def set_top1(folder: Path, top1: float, *, converged: bool = True) -> None:
    """Gives a run of the study another top-1, in metrics and predictions."""
    known = json.loads((folder / "metrics.json").read_text())
    changes = {"val/top1_pct": top1, **top1_bounds(top1), "converged": converged}
    write_json(folder / "metrics.json", **known | changes)
    write_hits(folder, np.arange(NUM_IMAGES) < round(top1 * NUM_IMAGES / 100))


def diverge(folder: Path) -> None:
    """Makes of a run's folder one whose loss became non-finite in the third epoch."""
    _write_history(folder, [_epoch(0, 30.0), _epoch(1, 30.0)])
    write_json(
        folder / "run.json",
        run=folder.name,
        mlflow_run_id="0" * 32,
        fingerprint="f",
        status="diverged",
        message="loss nan in epoch 1 at step 5, lr 0.1; images of this worker's batch: ['train/3/7']",
    )
    write_json(
        folder / "metrics.json",
        **{
            "val/top1_pct": 19.7,
            "val/top5_pct": 66.0,
            "val/loss": None,
            "val/flop_agreement_pct": 100.0,
            "equivariance/max_rel_error": float("nan"),
            "converged": False,
        },
    )


def load_results(folder: Path, experiment: config.Experiment) -> dict[str, run_results.RunResult]:
    return {r.run: r for r in run_results.load_results(experiment, folder / "outputs", folder / "reports")}


def cells(folder: Path, experiment: config.Experiment) -> dict[str, dict[str, str]]:
    compared = table.build_table(list(load_results(folder, experiment).values()))
    return {row[0]: dict(zip(compared.columns, row, strict=True)) for row in compared.texts}
