"""One trial of a sweep: what it trains, where it keeps what it has done, and how Ray Tune runs it.

A trial's folder is named by the fingerprint of all that its weights are a function of. What stands there is never
trained again: a trial that is started once more first reports the epochs in its journal, and then goes on from its
checkpoint. So a sweep needs no memory of its own; run again after whatever ended it, it suggests the same trials and
finds them as they were left.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pipeline.config import Experiment, Train
from pipeline.files import read_json, write_json

State = Literal["finished", "stopped", "diverged", "failed"]
STATES: tuple[State, ...] = ("finished", "stopped", "diverged", "failed")
METRIC = "val/top1_pct"
RUN_FAILURES = 2  # times that a trial is started again after its process, or a worker, died


@dataclass(frozen=True)
class Spec:
    """A trial before it starts."""

    plan: str
    """What it belongs to, such as the run that is tuned."""
    number: int
    """Place in the plan, from 0."""
    round: int
    seed: int
    params: Mapping[str, Any]
    """What is varied, and its values."""
    experiment: Experiment
    """What is trained: the model and the recipe of its run `plan`, the data, the workers."""
    classes: int | None
    """So many classes of the data; None: all."""
    images_per_epoch: int
    """What it trains on in one epoch, repetitions included."""
    fingerprint: str
    confirms: bool = False
    """Whether it is trained to its end, whatever others have reached."""

    @property
    def name(self) -> str:
        """Unique in the sweep."""
        return f"{self.plan}-{self.number:04d}"

    @property
    def epochs(self) -> int:
        return self.experiment.recipe(self.plan).epochs


@dataclass(frozen=True)
class Outcome:
    """A trial that has ended."""

    spec: Spec
    state: State
    rows: tuple[Mapping[str, float], ...]
    """A row per epoch, with history.csv's columns."""
    seconds: float
    """Training time, over all interruptions; validation and start-up come on top."""
    message: str | None = None
    """Why it diverged or failed."""

    @property
    def top1_pct(self) -> float | None:
        """The best validation top-1 of its epochs; None for a trial without any."""
        return max((row[METRIC] for row in self.rows), default=None)


class Folder:
    """What a trial leaves: `epochs.jsonl`, a line per epoch; `outcome.json` at its end; checkpoints until then."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.journal = path / "epochs.jsonl"

    def rows(self) -> list[dict[str, Any]]:
        """The epochs so far. A line that a kill has cut is none, and of an epoch done twice the later one counts."""
        if not self.journal.is_file():
            return []
        lines = self.journal.read_text().splitlines(keepends=True)
        rows = [json.loads(line) for line in lines if line.endswith("\n")]
        return list({row["epoch"]: row for row in rows if "epoch" in row}.values())

    def append(self, row: Mapping[str, Any]) -> None:
        """Adds an epoch, on a line of its own even behind one that was cut."""
        self.path.mkdir(parents=True, exist_ok=True)
        with self.journal.open("a+") as file:
            file.seek(0)
            whole = file.read().rpartition("\n")[0::2]
            if whole[1]:
                file.truncate(len(whole[0].encode()) + bool(whole[0]))
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def note(self, name: str) -> dict[str, Any]:
        """The content of `<name>.json`; empty where there is none."""
        return read_json(self.path / f"{name}.json", {})

    def write(self, name: str, content: Mapping[str, Any]) -> None:
        write_json(self.path / f"{name}.json", content)

    def tidy(self) -> None:
        """Removes the checkpoints and Ray's own notes, which a trial that has ended needs no more."""
        for path in self.path.iterdir() if self.path.is_dir() else ():
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)


def resources(settings: Train, gpu: bool) -> dict[str, int | float]:
    """What each worker of a trial holds: its cores, its loaders' cores, a GPU."""
    return {"CPU": settings.cpus_per_worker + settings.loader_workers, **({"GPU": 1} if gpu else {})}


def run(config: Mapping[str, Any]) -> None:
    """What Ray Tune calls: goes through the trial of `spec`, in the folder `place`, and reports every epoch.

    A trial of one worker trains in this process, which Tune gives the next trial when it is done: a process of its
    own, with torch and timm to import, would cost 8 s of a core. Of several workers, each trial is a Ray Train run.
    """
    from ray import tune

    from pipeline import worker

    spec, root = config["spec"], config["root"]
    folder = Folder(Path(config["place"]) / spec.fingerprint)
    rows = folder.rows()
    for row in rows:
        tune.report(row)
    if folder.note("outcome"):
        return
    task = worker.Task(spec.experiment, spec.plan, root, f"{config['storage']}/{spec.fingerprint}/steps",
                       str(folder.path / "stop"), spec.classes)
    folder.path.mkdir(parents=True, exist_ok=True)
    try:
        outcome = (_in_workers if spec.experiment.train.workers != 1 else _here)(task, folder, config)
    except Exception as error:
        folder.write("failure", {"message": " ".join(str(error).strip().splitlines()[-1:]) or type(error).__name__})
        raise
    for row in outcome["history"][len(folder.rows()) :]:  # killed between the checkpoint of an epoch and its report
        folder.append(row)
        tune.report(row)
    folder.write("outcome", {"state": outcome["status"], "message": outcome["message"]})
    folder.tidy()


class _Here:
    """A worker that is alone, in the trial's own process: worker.RayTrain's members."""

    rank, world_size = 0, 1

    def __init__(self, folder: Folder) -> None:
        import torch

        self._folder = folder
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def report(self, metrics: dict[str, Any]) -> None:
        """The journal first, then Tune, where a trial that is to stop ends."""
        from ray import tune

        if "epoch" in metrics:
            self._folder.append(metrics)
            tune.report(metrics)


def _here(task: Any, folder: Folder, config: Mapping[str, Any]) -> dict[str, Any]:
    from pipeline import worker

    return worker.work(task, _Here(folder))


def _in_workers(task: Any, folder: Folder, config: Mapping[str, Any]) -> dict[str, Any]:
    import ray.train
    from ray.tune.integration.ray_train import TuneReportCallback

    from pipeline import journal, train, worker

    settings = task.experiment.train
    outcome = train.Trainer(
        lambda: worker.work(task),
        scaling_config=ray.train.ScalingConfig(
            num_workers=settings.workers, use_gpu=config["gpu"],
            resources_per_worker=dict(resources(settings, config["gpu"])),
        ),
        run_config=ray.train.RunConfig(
            name=f"ray-{time.time_ns()}",  # another name each time: Ray shall not restore what it remembers
            storage_path=f"{config['storage']}/{config['spec'].fingerprint}",
            failure_config=ray.train.FailureConfig(max_failures=RUN_FAILURES),
            callbacks=[journal.Journal(folder.journal), TuneReportCallback()],
        ),
    ).fit().return_value
    assert outcome is not None  # of rank 0, whose function ended: `fit` has raised otherwise
    return outcome
