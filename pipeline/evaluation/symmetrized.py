"""Symmetrized runs: the weights of a trained run, evaluated with its network averaged over a group of symmetries."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

from pipeline import track
from pipeline.base.config import Experiment
from pipeline.base.errors import ConfigError
from pipeline.base.files import write_json
from pipeline.base.yaml_files import dump_yaml
from pipeline.evaluation.evaluate import Metrics, call_here, evaluate_trained_weights
from pipeline.evaluation.networks import symmetrize_network


def evaluate_symmetrized_run(
    experiment: Experiment, run_name: str, outputs: Path = Path("outputs"), call: Callable[..., Metrics] = call_here
) -> Metrics:
    """Evaluates a symmetrized run, writes its folder, and logs it as an MLflow run of its own.

    The folder gets the files of a trained run except for weights and history: config.yaml, run.json, metrics.json and
    predictions.parquet. Status, message and best epoch in run.json are those of the training.

    Args:
        call: calls a function with arguments where it computes fastest.
    Raises: ConfigError if the run is not a symmetrized one, or its weights were not trained; ModelError for a group
    that does not exist; ShardError and SourceError for unreadable images.
    """
    trained_name = experiment.trained_name(run_name)
    if run_name not in experiment.symmetrized:
        raise ConfigError(f"{run_name} is a trained run, not one of `symmetrized`: run `dvc repro evaluate@{run_name}`")
    symmetrized, folder = experiment.symmetrized[run_name], outputs / run_name
    folder.mkdir(parents=True, exist_ok=True)
    metrics = call(
        evaluate_trained_weights,
        experiment,
        trained_name,
        folder,
        outputs,
        partial(symmetrize_network, symmetrized=symmetrized),
    )
    (folder / "config.yaml").write_text(dump_yaml(experiment.resolved(run_name)), encoding="utf-8")
    run_id = track.start_run(experiment, run_name)
    training = json.loads((outputs / trained_name / "run.json").read_text())
    write_json(folder / "run.json", {**training, "run": run_name, "mlflow_run_id": run_id})
    measured = {name: value for name, value in metrics.items() if name != "converged"}
    track.log_results(run_id, measured, [folder / "metrics.json", folder / "config.yaml"])
    track.end_run(run_id, training["status"])
    return metrics
