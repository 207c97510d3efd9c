"""Tracking: one MLflow experiment per study, one MLflow run per trained model.

This is the only file that imports mlflow. A run calls `start_run`, `log_epochs`, `log_results` and `end_run`.
Later stages log into the same run through its id in `outputs/<run>/run.json`. If the database was deleted meanwhile,
logging only warns and the training continues.

The MLflow UI does not know our metrics. The experiment therefore has a saved view with the columns that compare runs,
and `ui_urls` returns the address that opens it.

Without MLFLOW_TRACKING_URI, everything is stored in the working directory, the repository's root: `mlflow.db` (sqlite)
and `mlartifacts/`. A process in another directory, such as a Ray worker, sets MLFLOW_TRACKING_URI to the driver's
`tracking_uri()`.
"""

from __future__ import annotations

import getpass
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
from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from pydantic import BaseModel

from flopeq.registry import describe
from pipeline.base.config import Experiment
from pipeline.base.errors import ConfigError
from pipeline.base.files import read_json
from pipeline.base.tracking_uri import deleted_experiment_message, tracking_uri

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # mlflow reads both on import: they keep it off the network

os.environ.setdefault("DO_NOT_TRACK", "true")

logger = logging.getLogger(__name__)

EPOCH_METRICS = ("train/loss", "val/top1_pct", "val/top5_pct", "perf/img_per_s", "perf/data_wait_pct", "lr")

EMA_METRICS = ("val/ema_top1_pct", "val/ema_top5_pct")

Status = Literal["finished", "stopped", "diverged", "failed", "interrupted"]

_MLFLOW_STATUS = {
    "finished": "FINISHED",
    "stopped": "FINISHED",
    "diverged": "FAILED",
    "failed": "FAILED",
    "interrupted": "KILLED",
}

LOCAL_UI_URL = "http://127.0.0.1:5000"
"""Address of `make ui`, which serves a local database."""

_DESCRIPTION_TAG = "mlflow.note.content"

_UI_WORKFLOW_QUERY = "workflowType=machine_learning"  # the UI shows language models' traces by default

_VIEW_NAME = "comparison"

_VIEW_TAG = f"mlflow.sharedViewState.{_VIEW_NAME}"

_VIEW_COLUMNS = {
    "tags": ("family", "variant", "recipe", "seed", "status"),
    "metrics": (
        "best/top1_pct",
        "best/top1_low_pct",
        "best/top1_high_pct",
        "difference/to_x_pct",
        "difference/to_x_low_pct",
        "difference/to_x_high_pct",
        "val/flop_agreement_pct",
        "complexity/gflops",
        "complexity/flop_ratio",
        "perf/throughput_ratio",
        "perf/forward_img_per_s",
    ),
}

_BEST_METRICS = ("top1_pct", "top1_low_pct", "top1_high_pct")

_LAST_STEP_TAG = "last_logged_step"

_MAX_PARAMS_PER_CALL = 100  # MLflow's limit of parameters per call

_MAX_METRICS_PER_CALL = 1000  # MLflow's limit of metrics per call


def find_run_id(run_name: str, outputs: Path = Path("outputs")) -> str | None:
    """Returns the id of the MLflow run of `train@<run_name>`, from its run.json, or None."""
    return read_json(outputs / run_name / "run.json", {}).get("mlflow_run_id")


def ui_urls(experiment: Experiment, run_ids: Iterable[str]) -> tuple[str | None, dict[str, str]]:
    """Returns the UI's address of the study's comparison and of each run; (None, {}) if nothing was tracked.

    The UI is the tracking server's, or the local one of `make ui`.
    """
    database = tracking_uri().removeprefix("sqlite:///")
    if database != tracking_uri() and not Path(database).is_file():
        return None, {}
    server = tracking_uri().rstrip("/") if tracking_uri().startswith("http") else LOCAL_UI_URL
    experiment_id = _experiment_id(_client(), experiment.tracking.experiment)
    return f"{server}/{_view_path(experiment_id)}", {
        run_id: f"{server}/{_run_path(experiment_id, run_id)}" for run_id in run_ids
    }


def create_experiment(name: str) -> None:
    """Creates the database and the experiment if they are missing. Two processes must not do this at the same time."""
    _experiment_id(_client(), name)


def start_run(
    experiment: Experiment,
    run_name: str,
    *,
    resume: str | None = None,
    device: str | None = None,
    adopted: str | None = None,
) -> str:
    """Starts an MLflow run with the parameters and tags of a run, or reopens `resume`. Returns its id.

    Args:
        resume: id of an interrupted MLflow run to resume; if it was deleted, a new one is started, with a warning.
        device: name of the training device; None: the device that this process would use.
        adopted: fingerprint of the configuration whose checkpoint the training starts from, as a tag.
    """
    client = _client()
    if resume is not None and _reopen_run(client, resume):
        return resume
    tags = {**_run_tags(experiment, run_name), **_provenance_tags(), "device": device or _device_name(experiment)}
    if adopted is not None:
        tags["adopted"] = adopted
    return _create_run(client, experiment, run_name, _flatten(experiment.resolved(run_name)), tags)


def log_epochs(run_id: str, history: Iterable[Mapping[str, float]]) -> None:
    """Logs the EPOCH_METRICS of epochs, and their EMA_METRICS if there is a moving average, each at step `epoch`.

    Epochs that the run already has are not logged again.
    """
    history, client = list(history), _client()
    if not history:
        return
    with _warn_if_deleted(run_id):
        existing_steps = {metric.step for metric in client.get_metric_history(run_id, "train/loss")}
        metrics = []
        for row in history:
            if (epoch := int(row["epoch"])) not in existing_steps:
                logged = {key: row[key] for key in (*EPOCH_METRICS, *EMA_METRICS) if key in row}
                metrics += _to_mlflow_metrics(logged, epoch)
        for start in range(0, len(metrics), _MAX_METRICS_PER_CALL):
            client.log_batch(run_id, metrics=metrics[start : start + _MAX_METRICS_PER_CALL])


def log_steps(run_id: str, rows: Iterable[Mapping[str, float]]) -> None:
    """Logs numbers of single steps, each at its `step`. Steps that the run already has are not logged again."""
    rows = list(rows)
    if not rows:
        return
    client = _client()
    with _warn_if_deleted(run_id):
        last = client.get_run(run_id).data.tags.get(_LAST_STEP_TAG, "-1")
        metrics = []
        for row in rows:
            if (step := int(row["step"])) > int(last):
                metrics += _to_mlflow_metrics({key: row[key] for key in row if key != "step"}, step)
                last = step
        for start in range(0, len(metrics), _MAX_METRICS_PER_CALL):
            client.log_batch(run_id, metrics=metrics[start : start + _MAX_METRICS_PER_CALL])
        client.set_tag(run_id, _LAST_STEP_TAG, last)


def log_results(run_id: str | None, metrics: Mapping[str, float | None], artifacts: Iterable[Path] = ()) -> None:
    """Logs final metrics and files of a run, replacing earlier ones. A metric that is None was not measured."""
    if run_id is None:
        logger.warning("no MLflow run to log %s into: train the run first", ", ".join(metrics))
        return
    client = _client()
    known = {key: float(value) for key, value in metrics.items() if value is not None}
    with _warn_if_deleted(run_id):
        client.log_batch(run_id, metrics=_to_mlflow_metrics(known, step=0))
        for path in artifacts:
            client.log_artifact(run_id, str(path))


def publish_report(run_id: str, card: Path, numbers: Mapping[str, float]) -> None:
    """Logs a run's report: its card, as description and file, and all its numbers.

    `val/top1_pct` belongs to the last epoch; `best/top1_pct` and its interval belong to the weights that were kept.
    """
    best = {f"best/{name}": numbers[f"val/{name}"] for name in _BEST_METRICS if f"val/{name}" in numbers}
    known = best | {key: float(value) for key, value in numbers.items() if not key.startswith("val/")}
    client = _client()
    with _warn_if_deleted(run_id):
        client.log_batch(
            run_id, metrics=_to_mlflow_metrics(known, step=0), tags=[RunTag(_DESCRIPTION_TAG, _card_body(card))]
        )
        client.log_artifact(run_id, str(card))


def start_sweep(experiment: Experiment, title: str, settings: BaseModel, *, resume: str | None = None) -> str:
    """Starts an MLflow run for a sweep, with its settings, or reopens `resume`. Returns its id."""
    client = _client()
    if resume is not None and _reopen_run(client, resume):
        return resume
    params = _flatten(settings.model_dump(mode="json", exclude_none=True))
    return _create_run(client, experiment, title, params, {**_provenance_tags(), "sweep": title.removeprefix("sweep_")})


def start_trial(
    experiment: Experiment, sweep_id: str, name: str, params: Mapping[str, Any], *, resume: str | None = None
) -> str:
    """Starts an MLflow run for a trial, nested in its sweep's run, or reopens `resume`. Returns its id."""
    client = _client()
    if resume is not None and _reopen_run(client, resume):
        return resume
    return _create_run(client, experiment, name, _flatten(params), {"mlflow.parentRunId": sweep_id})


def end_run(run_id: str, status: Status) -> None:
    """Ends a run with MLflow's status (FINISHED, FAILED, KILLED) and sets the tag `status` to ours."""
    with _warn_if_deleted(run_id):
        _client().set_tag(run_id, "status", status)
        _client().set_terminated(run_id, _MLFLOW_STATUS[status])


def _view_path(experiment_id: str) -> str:
    return f"#/experiments/{experiment_id}/runs?{_UI_WORKFLOW_QUERY}&viewStateShareKey={_VIEW_NAME}"


def _run_path(experiment_id: str, run_id: str) -> str:
    return f"#/experiments/{experiment_id}/runs/{run_id}?{_UI_WORKFLOW_QUERY}"


def _experiment_tags(experiment_id: str) -> dict[str, str]:
    """Returns the tags that make the UI open on the comparison. The saved view has the format of MLflow's UI (3.17)."""
    widths = {f"{kind}.`{name}`": 45 + 7 * len(name) for kind, names in _VIEW_COLUMNS.items() for name in names}
    state = {
        "orderByKey": "metrics.`best/top1_pct`",
        "orderByAsc": False,
        "selectedColumns": list(widths),
        "columnOrder": list(widths),
        "columnWidths": widths,
    }
    view = {"name": _VIEW_NAME, "createdAt": 0, "updatedAt": 0, "state": json.dumps(state)}
    return {
        "mlflow.experimentKind": "custom_model_development",
        _VIEW_TAG: json.dumps(view),
        _DESCRIPTION_TAG: f"[Compare the runs]({_view_path(experiment_id)}): "
        "accuracy, FLOPs and throughput of X, E(X) and H(X). "
        "A run's description is its model card, and its artifacts are configuration and weights.",
    }


def _card_body(card: Path) -> str:
    """Returns a card without its hub metadata header."""
    return card.read_text(encoding="utf-8").partition("\n---\n")[2]


def _create_run(
    client: MlflowClient, experiment: Experiment, name: str, params: Mapping[str, str], tags: Mapping[str, str]
) -> str:
    run = client.create_run(_experiment_id(client, experiment.tracking.experiment), tags=dict(tags), run_name=name)
    entries = [Param(key, value) for key, value in params.items()]
    for start in range(0, len(entries), _MAX_PARAMS_PER_CALL):
        client.log_batch(run.info.run_id, params=entries[start : start + _MAX_PARAMS_PER_CALL])
    return run.info.run_id


def _client() -> MlflowClient:
    return MlflowClient(tracking_uri())


def _experiment_id(client: MlflowClient, name: str) -> str:
    existing = client.get_experiment_by_name(name)
    if existing and existing.lifecycle_stage == "deleted":
        raise ConfigError(deleted_experiment_message(name, existing.experiment_id))
    artifact_location = None if os.environ.get("MLFLOW_TRACKING_URI") else (Path.cwd() / "mlartifacts").as_uri()
    experiment_id = (
        existing.experiment_id if existing else client.create_experiment(name, artifact_location=artifact_location)
    )
    for key, value in _experiment_tags(experiment_id).items():
        if not existing or key not in existing.tags or _is_former_view(key, existing.tags[key], value):
            client.set_experiment_tag(experiment_id, key, value)  # what a user has edited is kept
    return experiment_id


def _is_former_view(key: str, existing: str, current: str) -> bool:
    """Whether a tag is our view with the columns of an earlier version, which no user has edited."""
    return key == _VIEW_TAG and existing != current and json.loads(existing)["updatedAt"] == 0


def _reopen_run(client: MlflowClient, run_id: str) -> bool:
    with _warn_if_deleted(run_id):
        client.update_run(run_id, status="RUNNING")
        return True
    return False


@contextmanager
def _warn_if_deleted(run_id: str) -> Iterator[None]:
    try:
        yield
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST" and "state is deleted" not in str(error):
            raise
        logger.warning("MLflow run %s is not in %s (deleted meanwhile?): continuing without it", run_id, tracking_uri())


def _to_mlflow_metrics(values: Mapping[str, float], step: int) -> list[Metric]:
    """The metrics at this moment, to 12 digits, because MLflow's tables show 85.94 as 85.94000000000001 otherwise."""
    now = int(time.time() * 1000)
    return [Metric(key, float(f"{value:.12g}"), now, step) for key, value in values.items()]


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """{"recipe": {"lr": 0.1}} -> {"recipe.lr": "0.1"}."""
    flat: dict[str, str] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = str(value)
    return flat


def _run_tags(experiment: Experiment, run_name: str) -> dict[str, str]:
    run = experiment.run(run_name)
    info = describe(run.model, run.args, symmetrized=run_name in experiment.symmetrized)
    known = {key: getattr(info, key) for key in ("paper_name", "family", "size", "variant")} if info else {}
    name, recipe = info.paper_name if info else run.model, run.recipe
    if info is None and run_name in experiment.symmetrized:
        known, name = {"variant": "S"}, f"S({name})"
    seed = str(experiment.seed_of(run_name))
    note = f"{name} on {experiment.data.name}, recipe {recipe}, seed {seed}. The report adds its model card."
    return {**known, "recipe": recipe, "seed": seed, _DESCRIPTION_TAG: note}


def _provenance_tags() -> dict[str, str]:
    """Returns the state of code, data and packages. `git_dirty` ignores dvc.lock, which `dvc repro` rewrites."""
    lock = Path("dvc.lock")
    changes = _run_git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!dvc.lock")
    commit = _run_git("rev-parse", "HEAD") or "unknown"
    return {
        "mlflow.user": _user_name(),
        "mlflow.source.name": "flopeq",
        "mlflow.source.type": "LOCAL",
        "git_commit": commit,
        "mlflow.source.git.commit": commit,  # the UI's column "Version"
        "git_dirty": "unknown" if changes is None else str(bool(changes)).lower(),
        "dvc_lock_sha256": hashlib.sha256(lock.read_bytes()).hexdigest() if lock.is_file() else "none",
        "versions.python": platform.python_version(),
        **{f"versions.{name}": _package_version(name) for name in ("torch", "timm", "ray", "flopeq")},
    }


def _user_name() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container may have no name for its user
        return "unknown"


def _package_version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _run_git(*command: str) -> str | None:
    try:
        completed = subprocess.run(["git", *command], capture_output=True, text=True, check=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return None
    return completed.stdout.strip()


def _device_name(experiment: Experiment) -> str:
    if experiment.train.gpu is not False and torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"cpu ({platform.machine()}, {os.cpu_count()} cores)"
