"""One trial of a sweep or of the scaling study: its specification, its directory, and what Ray Tune runs.

The fingerprint of a trial names its directory. Completed epochs are never trained again: a restarted trial first
reports the epochs in its history file and then resumes from its checkpoint. A sweep therefore needs no state of its
own. A restarted sweep suggests the same trials and finds their directories.
"""

from __future__ import annotations

import csv
import json
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from pipeline.base.config import Experiment
from pipeline.base.files import atomic_path, read_json, write_json
from pipeline.base.schema import Train, TrialParams
from pipeline.training.step_training import StepTraining

State = Literal["finished", "stopped", "diverged", "failed"]

TRIAL_STATES: tuple[State, ...] = ("finished", "stopped", "diverged", "failed")

METRIC = "val/top1_pct"

USED_TRIALS = "used"
"""Name of the file in a sweep's directory that lists the fingerprints of its trials, once the sweep has ended."""

LOSSES_FILE = "losses.npz"
"""Name of the file in a trial's directory with the loss of every validation image."""

MAX_FAILURES = 2  # restarts of a trial after its process or a worker died


@dataclass(frozen=True)
class TrialSpec:
    """The specification of a trial."""

    run_name: str
    """The run that the sweep varies."""
    index: int
    """Index in the plan, from 0."""
    round: int
    seed: int
    params: Mapping[str, Any]
    """The varied fields and their values."""
    experiment: Experiment
    """The experiment to train: model and recipe of the run `run_name`, data, workers."""
    classes: int | None
    """Number of classes of the data; None: all."""
    images_per_epoch: int
    """Training images per epoch, repetitions included."""
    fingerprint: str
    is_confirmation: bool = False
    """Whether it confirms a result and is therefore never stopped early."""
    step_training: StepTraining | None = None
    """Length and images of a trial of the scaling study, which has one epoch."""
    label: str | None = None
    """Its name; None: made from run and index."""
    cost: float | None = None
    """What it takes, in any unit that is common to its sweep; None: its number of epochs."""

    @property
    def name(self) -> str:
        """Unique in the sweep."""
        return self.label or f"{self.run_name}-{self.index:04d}"

    @property
    def epochs(self) -> int:
        return self.experiment.recipe(self.run_name).epochs

    @property
    def cost_per_epoch(self) -> float:
        return 1 if self.cost is None else self.cost / self.epochs


@dataclass(frozen=True)
class TrialOutcome:
    """The outcome of a trial."""

    spec: TrialSpec
    state: State
    rows: tuple[Mapping[str, float], ...]
    """One row per epoch, with the columns of history.csv."""
    seconds: float
    """Training time over all interruptions, without validation and start-up."""
    message: str | None = None
    """Why it diverged or failed."""

    @property
    def top1_pct(self) -> float | None:
        """The best validation top-1 of its epochs; None for a trial without any."""
        return max((row[METRIC] for row in self.rows), default=None)


class TrialGroup(Protocol):
    """Trials that run together: a sweep or the scaling study."""

    @property
    def experiment(self) -> Experiment: ...

    @property
    def settings(self) -> TrialParams: ...

    @property
    def name(self) -> str:
        """Name of the folder of its trials."""
        ...

    @property
    def title(self) -> str:
        """Name of its stage and of its MLflow run."""
        ...

    @property
    def trials_dir(self) -> Path: ...


class TrialDirectory:
    """Files of a trial: `epochs.jsonl` (a line per epoch), `outcome.json` when it ended, checkpoints until then."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.history_file = path / "epochs.jsonl"

    def load_history(self) -> list[dict[str, Any]]:
        """Returns the epochs so far. Truncated lines are ignored; of a repeated epoch, the later line counts."""
        if not self.history_file.is_file():
            return []
        lines = self.history_file.read_text().splitlines(keepends=True)
        rows = [json.loads(line) for line in lines if line.endswith("\n")]
        return list({row["epoch"]: row for row in rows if "epoch" in row}.values())

    def append_epoch(self, row: Mapping[str, Any]) -> None:
        """Appends an epoch, after removing a truncated last line."""
        self.path.mkdir(parents=True, exist_ok=True)
        with self.history_file.open("a+") as file:
            file.seek(0)
            complete_lines = file.read().rpartition("\n")[0::2]
            if complete_lines[1]:
                file.truncate(len(complete_lines[0].encode()) + bool(complete_lines[0]))
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def load(self, name: str) -> dict[str, Any]:
        """Returns the content of `<name>.json`, or {}."""
        return read_json(self.path / f"{name}.json", {})

    def save(self, name: str, content: Mapping[str, Any]) -> None:
        write_json(self.path / f"{name}.json", content)

    def cleanup(self) -> None:
        """Removes the checkpoints and Ray's own files, which an ended trial no longer needs."""
        for path in self.path.iterdir() if self.path.is_dir() else ():
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)


def list_unused_trials(trials_dir: Path) -> list[Path]:
    """Returns the directories of trials that a finished sweep does not use: those of other configurations.

    Of a sweep that has not ended, every trial may still be used.
    """
    used = TrialDirectory(trials_dir).load(USED_TRIALS).get("fingerprints")
    if used is None:
        return []
    return sorted(path for path in trials_dir.iterdir() if path.is_dir() and path.name not in used)


def worker_resources(settings: Train, gpu: bool) -> dict[str, int | float]:
    """Returns the resources of each worker of a trial: its cores, its loaders' cores, a GPU."""
    return {"CPU": settings.cpus_per_worker + settings.loader_workers, **({"GPU": 1} if gpu else {})}


def run_trial(config: Mapping[str, Any]) -> None:
    """Trains the trial `spec` in its folder below `trials_dir` and reports every epoch. Ray Tune calls this.

    A trial of one worker trains in this process, which Tune reuses for the next trial: a new process would import torch
    and timm, which takes 8 s of a core. A trial of several workers is a Ray Train run.
    """
    from ray import tune

    from pipeline.training import worker

    spec, root = config["spec"], config["root"]
    folder = TrialDirectory(Path(config["trials_dir"]) / spec.fingerprint)
    rows = folder.load_history()
    for row in rows:
        tune.report(row)
    if folder.load("outcome"):
        return
    task = worker.WorkerTask(
        spec.experiment,
        spec.run_name,
        root,
        f"{config['storage']}/{spec.fingerprint}/steps",
        str(folder.path / "stop"),
        spec.classes,
        step_training=spec.step_training,
    )
    folder.path.mkdir(parents=True, exist_ok=True)
    try:
        outcome = (_train_with_ray_train if spec.experiment.train.workers != 1 else _train_in_process)(
            task, folder, config
        )
    except Exception as error:
        folder.save("failure", {"message": " ".join(str(error).strip().splitlines()[-1:]) or type(error).__name__})
        raise
    for row in outcome["history"][len(folder.load_history()) :]:  # missing if killed between checkpoint and report
        folder.append_epoch(row)
        tune.report(row)
    if "image_losses" in outcome:
        _save_losses(folder.path / LOSSES_FILE, outcome["image_losses"])
    folder.save("outcome", {"state": outcome["status"], **{key: outcome[key] for key in ("message", "compiled")}})
    folder.cleanup()


class LocalContext:
    """A single worker in the trial's own process, with the members of worker.RayTrainContext."""

    rank, world_size = 0, 1

    def __init__(self, folder: TrialDirectory, *, gpu: bool) -> None:
        import torch

        self._folder = folder
        # Not torch.cuda.is_available(): a trial without a GPU of its own sees those of other trials.
        self.device = torch.device("cuda" if gpu else "cpu")

    def report(self, metrics: dict[str, Any]) -> None:
        """Appends to the history file first, then reports to Tune, which may end the trial here."""
        from ray import tune

        if "epoch" in metrics:
            self._folder.append_epoch(metrics)
            tune.report(metrics)


def _train_in_process(task: Any, folder: TrialDirectory, config: Mapping[str, Any]) -> dict[str, Any]:
    from pipeline.training import worker

    return worker.train_loop_per_worker(task, LocalContext(folder, gpu=config["gpu"]))


def _train_with_ray_train(task: Any, folder: TrialDirectory, config: Mapping[str, Any]) -> dict[str, Any]:
    import ray.train
    from ray.tune.integration.ray_train import TuneReportCallback

    from pipeline.training import report_log, trainer, worker

    settings = task.experiment.train
    folder.path.mkdir(parents=True, exist_ok=True)
    folder.history_file.touch()
    outcome = (
        trainer.SigintSafeTrainer(
            lambda: worker.train_loop_per_worker(task),
            scaling_config=ray.train.ScalingConfig(
                num_workers=settings.workers,
                use_gpu=config["gpu"],
                resources_per_worker=dict(worker_resources(settings, config["gpu"])),
            ),
            run_config=ray.train.RunConfig(
                name=f"ray-{time.time_ns()}",  # a new name each time, so that Ray restores nothing
                storage_path=f"{config['storage']}/{config['spec'].fingerprint}",
                failure_config=ray.train.FailureConfig(max_failures=MAX_FAILURES),
                callbacks=[report_log.ReportLog(folder.history_file), TuneReportCallback()],
            ),
        )
        .fit()
        .return_value
    )
    assert outcome is not None  # rank 0 has returned; otherwise `fit` raises
    return outcome


def _save_losses(path: Path, losses: Any) -> None:
    import numpy as np

    arrays = {name: array for name, array in vars(losses).items() if array is not None}
    with atomic_path(path) as partial, partial.open("wb") as file:
        np.savez(file, **arrays)


def write_trials_csv(path: Path, outcomes: Mapping[str, Sequence[TrialOutcome]]) -> None:
    """Writes one row per trial, in the order of the plans."""
    ended = [outcome for of in outcomes.values() for outcome in of]
    fields = list(dict.fromkeys(field for outcome in ended for field in outcome.spec.params))
    with path.open("w", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(
            ["trial", "run", "round", "seed", "state", "top1_pct", "epochs", "seconds", "confirms", *fields, "message"]
        )
        for outcome in ended:
            spec = outcome.spec
            top1 = "" if outcome.top1_pct is None else f"{outcome.top1_pct:.4f}"
            values = ["" if (value := spec.params.get(field)) is None else value for field in fields]
            table.writerow(
                [
                    spec.name,
                    spec.run_name,
                    spec.round,
                    spec.seed,
                    outcome.state,
                    top1,
                    len(outcome.rows),
                    f"{outcome.seconds:.1f}",
                    int(spec.is_confirmation),
                    *values,
                    outcome.message or "",
                ]
            )
