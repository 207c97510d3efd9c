"""Tracking: one MLflow experiment per study, one MLflow run per trained model.

The only file that imports mlflow. A run is `start_run`, `log_epoch` per epoch, `log_final`, `finish`; stages
that come later write into it by the id that `outputs/<run>/run.json` keeps. Numbers that cannot be written
because the database was deleted meanwhile are worth a warning, never the training.

The UI knows nothing of our metrics by itself. So the experiment carries a saved view, with the columns in which runs
compare, and `urls` has the address that opens on it.

Without MLFLOW_TRACKING_URI everything lies in the working directory, the repository's root: `mlflow.db`
(sqlite) and `mlartifacts/`. A process that works elsewhere, such as a Ray worker, sets MLFLOW_TRACKING_URI to
the driver's `uri()`.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import subprocess
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import torch

from flopeq.registry import describe
from pipeline.config import Experiment
from pipeline.files import read_json

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # read on import: they keep mlflow off the network
os.environ.setdefault("DO_NOT_TRACK", "true")

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag
from mlflow.exceptions import MlflowException

logger = logging.getLogger(__name__)

EPOCH_METRICS = ("train/loss", "val/top1_pct", "val/top5_pct", "perf/img_per_s", "lr")
AVERAGE_METRICS = ("val/ema_top1_pct", "val/ema_top5_pct")
Status = Literal["finished", "stopped", "diverged", "failed", "interrupted"]
_STATUS = {"finished": "FINISHED", "stopped": "FINISHED", "diverged": "FAILED", "failed": "FAILED",
           "interrupted": "KILLED"}
UI = "http://127.0.0.1:5000"
"""Where `make ui` shows what a file holds."""
_NOTE = "mlflow.note.content"
_TRAINING = "workflowType=machine_learning"  # the UI shows language models' traces, unless it is told otherwise
_VIEW = "comparison"
_COLUMNS = {
    "tags": ("family", "variant", "recipe", "seed", "status"),
    "metrics": ("best/top1_pct", "val/flop_agreement_pct", "complexity/gflops", "complexity/flop_ratio",
                "perf/throughput_ratio", "perf/forward_img_per_s"),
}
_BATCH = 100  # parameters that MLflow takes in one call
_METRICS = 1000  # and metrics


def uri() -> str:
    """Where runs are tracked: MLFLOW_TRACKING_URI, or a sqlite file in the working directory."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Path.cwd() / 'mlflow.db'}"


def run_id(run_name: str, outputs: Path = Path("outputs")) -> str | None:
    """The MLflow run that `train@<run_name>` made, from its run.json; None where it made none."""
    return read_json(outputs / run_name / "run.json", {}).get("mlflow_run_id")


def urls(experiment: Experiment, run_ids: Iterable[str]) -> tuple[str | None, dict[str, str]]:
    """Where the UI shows the study's runs side by side, and each run; (None, {}) where nothing was ever tracked.

    The UI is the tracking server's, or that of `make ui`.
    """
    database = uri().removeprefix("sqlite:///")
    if database != uri() and not Path(database).is_file():
        return None, {}
    server = uri().rstrip("/") if uri().startswith("http") else UI
    id_ = _experiment_id(_client(), experiment.tracking.experiment)
    return f"{server}/{_view_path(id_)}", {run_id: f"{server}/{_run_path(id_, run_id)}" for run_id in run_ids}


def make_experiment(name: str) -> None:
    """Makes database and experiment where they are missing; two processes that both did would disturb each other."""
    _experiment_id(_client(), name)


def start_run(
    experiment: Experiment, run_name: str, *, resume: str | None = None, device: str | None = None
) -> str:
    """A new MLflow run with the parameters and tags of a run of the experiment, or `resume` reopened.

    Args:
        resume: id of an interrupted run to go on with; when it is gone, a new one is made, with a warning.
        device: what it trains on; None: what this process would train on.
    """
    client = _client()
    if resume is not None and _reopen(client, resume):
        return resume
    tags = {**_identity(experiment, run_name), **_provenance(), "device": device or _device(experiment)}
    return _create(client, experiment, run_name, _flatten(experiment.resolved(run_name)), tags)


def log_epoch(run_id: str, metrics: Mapping[str, float]) -> None:
    """One epoch's EPOCH_METRICS, and AVERAGE_METRICS where there is an average, at step `epoch`."""
    log_epochs(run_id, [metrics])


def log_epochs(run_id: str, history: Iterable[Mapping[str, float]]) -> None:
    """Several epochs, each once: those that the run already has are left as they are."""
    client = _client()
    with _unless_gone(run_id):
        known = {metric.step for metric in client.get_metric_history(run_id, "train/loss")}
        metrics = []
        for row in history:
            if (epoch := int(row["epoch"])) not in known:
                told = {key: row[key] for key in EPOCH_METRICS}
                told |= {key: row[key] for key in AVERAGE_METRICS if key in row}
                metrics += _metrics(told, epoch)
        for start in range(0, len(metrics), _METRICS):
            client.log_batch(run_id, metrics=metrics[start : start + _METRICS])


def log_final(
    run_id: str | None, metrics: Mapping[str, float | None], artifacts: Iterable[Path] = ()
) -> None:
    """Final metrics (None: not measured, left out) and files of a run; logged again, they replace the old."""
    if run_id is None:
        logger.warning("no MLflow run to log %s into: train the run first", ", ".join(metrics))
        return
    client = _client()
    known = {key: float(value) for key, value in metrics.items() if value is not None}
    with _unless_gone(run_id):
        client.log_batch(run_id, metrics=_metrics(known, step=0))
        for path in artifacts:
            client.log_artifact(run_id, str(path))


def present(run_id: str, card: Path, numbers: Mapping[str, float]) -> None:
    """What the report knows of a run: its card, as description and file, and all its numbers.

    `val/top1_pct` is of the last epoch; `best/top1_pct` of the weights that were kept.
    """
    best = {"best/top1_pct": numbers["val/top1_pct"]} if "val/top1_pct" in numbers else {}
    known = best | {key: float(value) for key, value in numbers.items() if not key.startswith("val/")}
    client = _client()
    with _unless_gone(run_id):
        client.log_batch(run_id, metrics=_metrics(known, step=0), tags=[RunTag(_NOTE, _body(card))])
        client.log_artifact(run_id, str(card))


def start_sweep(experiment: Experiment, name: str, *, resume: str | None = None) -> str:
    """A new MLflow run for a sweep of the experiment, with its settings, or `resume` reopened."""
    client = _client()
    if resume is not None and _reopen(client, resume):
        return resume
    settings = _flatten(getattr(experiment.sweeps, name).model_dump(mode="json", exclude_none=True))
    return _create(client, experiment, f"sweep_{name}", settings, {**_provenance(), "sweep": name})


def start_trial(
    experiment: Experiment, sweep_id: str, name: str, params: Mapping[str, Any], *, resume: str | None = None
) -> str:
    """A new MLflow run for a trial, nested in its sweep's, or `resume` reopened."""
    client = _client()
    if resume is not None and _reopen(client, resume):
        return resume
    return _create(client, experiment, name, _flatten(params), {"mlflow.parentRunId": sweep_id})


def finish(run_id: str, status: Status) -> None:
    """Closes a run: FINISHED, FAILED or KILLED in MLflow, with our word for it in the tag `status`."""
    with _unless_gone(run_id):
        _client().set_tag(run_id, "status", status)
        _client().set_terminated(run_id, _STATUS[status])


def _view_path(experiment_id: str) -> str:
    return f"#/experiments/{experiment_id}/runs?{_TRAINING}&viewStateShareKey={_VIEW}"


def _run_path(experiment_id: str, run_id: str) -> str:
    return f"#/experiments/{experiment_id}/runs/{run_id}?{_TRAINING}"


def _experiment_tags(experiment_id: str) -> dict[str, str]:
    """What makes the UI open on something useful. The saved view is as MLflow's own UI (3.17) writes it."""
    widths = {f"{kind}.`{name}`": 45 + 7 * len(name) for kind, names in _COLUMNS.items() for name in names}
    state = {"orderByKey": "metrics.`best/top1_pct`", "orderByAsc": False, "selectedColumns": list(widths),
             "columnOrder": list(widths), "columnWidths": widths}
    view = {"name": _VIEW, "createdAt": 0, "updatedAt": 0, "state": json.dumps(state)}
    return {
        "mlflow.experimentKind": "custom_model_development",
        f"mlflow.sharedViewState.{_VIEW}": json.dumps(view),
        _NOTE: f"[Compare the runs]({_view_path(experiment_id)}): accuracy, FLOPs and throughput of X, E(X) and H(X). "
               "A run's description is its model card, and its artifacts are configuration and weights.",
    }


def _body(card: Path) -> str:
    """A card without the header for hubs."""
    return card.read_text(encoding="utf-8").partition("\n---\n")[2]


def _create(
    client: MlflowClient, experiment: Experiment, name: str, params: Mapping[str, str], tags: Mapping[str, str]
) -> str:
    run = client.create_run(_experiment_id(client, experiment.tracking.experiment), tags=dict(tags), run_name=name)
    entries = [Param(key, value) for key, value in params.items()]
    for start in range(0, len(entries), _BATCH):
        client.log_batch(run.info.run_id, params=entries[start : start + _BATCH])
    return run.info.run_id


def _client() -> MlflowClient:
    return MlflowClient(uri())


def _experiment_id(client: MlflowClient, name: str) -> str:
    known = client.get_experiment_by_name(name)
    ours = None if os.environ.get("MLFLOW_TRACKING_URI") else (Path.cwd() / "mlartifacts").as_uri()
    id_ = known.experiment_id if known else client.create_experiment(name, artifact_location=ours)
    for key, value in _experiment_tags(id_).items():
        if not known or key not in known.tags:  # what a person has changed stays so
            client.set_experiment_tag(id_, key, value)
    return id_


def _reopen(client: MlflowClient, run_id: str) -> bool:
    with _unless_gone(run_id):
        client.update_run(run_id, status="RUNNING")
        return True
    return False


@contextmanager
def _unless_gone(run_id: str) -> Iterator[None]:
    try:
        yield
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST" and "state is deleted" not in str(error):
            raise
        logger.warning("MLflow run %s is not in %s (deleted meanwhile?): going on without it", run_id, uri())


def _metrics(values: Mapping[str, float], step: int) -> list[Metric]:
    now = int(time.time() * 1000)
    return [Metric(key, value, now, step) for key, value in values.items()]


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """{"recipe": {"lr": 0.1}} -> {"recipe.lr": "0.1"}."""
    flat: dict[str, str] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = str(value)
    return flat


def _identity(experiment: Experiment, run_name: str) -> dict[str, str]:
    info = describe(experiment.run(run_name).model)
    known = {key: getattr(info, key) for key in ("paper_name", "family", "size", "variant")} if info else {}
    name, recipe = info.paper_name if info else experiment.run(run_name).model, experiment.run(run_name).recipe
    seed = str(experiment.seed_of(run_name))
    note = f"{name} on {experiment.data.name}, recipe {recipe}, seed {seed}. Its card comes with the report."
    return {**known, "recipe": recipe, "seed": seed, _NOTE: note}


def _provenance() -> dict[str, str]:
    """State of code, data and packages; "dirty" leaves out dvc.lock, which `dvc repro` itself rewrites."""
    lock = Path("dvc.lock")
    changes = _git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!dvc.lock")
    commit = _git("rev-parse", "HEAD") or "unknown"
    return {
        "git_commit": commit,
        "mlflow.source.git.commit": commit,  # the UI's column "Version"
        "git_dirty": "unknown" if changes is None else str(bool(changes)).lower(),
        "dvc_lock_sha256": hashlib.sha256(lock.read_bytes()).hexdigest() if lock.is_file() else "none",
        "versions.python": platform.python_version(),
        **{f"versions.{name}": _version(name) for name in ("torch", "timm", "ray", "flopeq")},
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _git(*command: str) -> str | None:
    try:
        done = subprocess.run(["git", *command], capture_output=True, text=True, check=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _device(experiment: Experiment) -> str:
    if experiment.train.gpu is not False and torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"cpu ({platform.machine()}, {os.cpu_count()} cores)"
