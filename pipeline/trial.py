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
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pipeline.config import Experiment, Train

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
    """What a trial leaves: `epochs.jsonl`, a line per epoch; `outcome.json` at its end; one checkpoint until then."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.journal = path / "epochs.jsonl"

    def rows(self) -> list[dict[str, Any]]:
        """The epochs so far. A line that a kill has cut is none, and of an epoch done twice the later one counts."""
        if not self.journal.is_file():
            return []
        lines = self.journal.read_text().splitlines(keepends=True)
        rows = [json.loads(line) for line in lines if line.endswith("\n")]
        return list({row["epoch"]: row for row in rows}.values())

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
        path = self.path / f"{name}.json"
        return json.loads(path.read_text()) if path.is_file() else {}

    def write(self, name: str, content: Mapping[str, Any]) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        partial = self.path / f"{name}.json.partial"
        partial.write_text(json.dumps(content) + "\n")
        os.replace(partial, self.path / f"{name}.json")

    def checkpoint(self) -> Path | None:
        """The one of the last epoch in the journal."""
        path = self.path / f"epoch-{len(self.rows()):04d}"
        return path if path.is_dir() else None

    def keep(self, checkpoint: str | None, name: str | None) -> None:
        """Copies a checkpoint's folder here, under that name, in one step."""
        if checkpoint is None or name is None:
            return
        partial = self.path / "checkpoint.partial"
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(checkpoint, partial)
        shutil.rmtree(self.path / name, ignore_errors=True)
        os.replace(partial, self.path / name)

    def tidy(self, but: str | None = None) -> None:
        """Removes all checkpoints, or all but one."""
        for path in [*self.path.glob("epoch-*"), self.path / "checkpoint.partial", self.path / "train"]:
            if path.name != but:
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

    spec, root = config["spec"], config["root"]
    folder = Folder(Path(config["place"]) / spec.fingerprint)
    rows = folder.rows()
    for row in rows:
        tune.report(row)
    if folder.note("outcome"):
        return
    work = {"experiment": spec.experiment, "run": spec.plan, "root": root, "classes": spec.classes}
    try:
        outcome = (_in_workers if spec.experiment.train.workers > 1 else _here)(work, folder, config, len(rows))
    except Exception:
        folder.write("failure", {"message": traceback.format_exc(limit=-1).strip().splitlines()[-1]})
        raise
    folder.write("outcome", {"state": outcome["status"], "message": outcome["message"]})
    folder.tidy()


class _Here:
    """A worker that is alone, in the trial's own process: train.RayTrain's members."""

    rank, world_size = 0, 1

    def __init__(self, folder: Folder) -> None:
        import torch

        self.folder = folder
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def checkpoint(self) -> Any:
        import ray.train

        path = self.folder.checkpoint()
        return None if path is None else ray.train.Checkpoint.from_directory(str(path))

    def report(self, row: dict[str, Any], folder: str | None, name: str | None) -> None:
        """The checkpoint, then the journal, then Tune: what the journal has is always to be gone on from."""
        from ray import tune

        self.folder.keep(folder, name)
        self.folder.append(row)
        self.folder.tidy(but=name)
        tune.report(row)


def _here(work: dict[str, Any], folder: Folder, config: Mapping[str, Any], reported: int) -> dict[str, Any]:
    from pipeline import train

    folder.path.mkdir(parents=True, exist_ok=True)
    if reported and folder.checkpoint() is None:  # lost with a disk: the journal alone cannot be gone on from
        folder.journal.unlink()
    return train.work({**work, "link": _Here(folder)})


def _in_workers(work: dict[str, Any], folder: Folder, config: Mapping[str, Any], reported: int) -> dict[str, Any]:
    import ray.train
    from ray import tune
    from ray.tune.integration.ray_train import TuneReportCallback

    from pipeline import journal, train

    spec = config["spec"]
    settings = spec.experiment.train
    folder.path.mkdir(parents=True, exist_ok=True)
    storage = f"{config['storage']}/{spec.fingerprint}" if config["storage"] else str(folder.path)
    result = train.Trainer(
        train.work,
        train_loop_config=work,
        scaling_config=ray.train.ScalingConfig(
            num_workers=settings.workers, use_gpu=config["gpu"],
            resources_per_worker=dict(resources(settings, config["gpu"])),
        ),
        run_config=ray.train.RunConfig(
            name="train",
            storage_path=storage,
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=1),
            failure_config=ray.train.FailureConfig(max_failures=RUN_FAILURES),
            callbacks=[journal.Journal(folder.journal), TuneReportCallback()],
        ),
    ).fit()
    outcome = result.return_value
    assert outcome is not None  # of rank 0, whose function ended: `fit` has raised otherwise
    for row in outcome["history"][len(folder.rows()) :]:  # killed between Ray's note of an epoch and ours
        folder.append(row)
        tune.report(row)
    return outcome
