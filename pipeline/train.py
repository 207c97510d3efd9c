"""Training a run of the experiment with Ray Train: where it stands, who works on it, what it leaves in outputs/<run>.

A configuration's fingerprint names its folder of checkpoints, and `run.json` there says which MLflow run it is. A
training of the same configuration goes on from the newest checkpoint, in its MLflow run, however it ended before; one
that had reached its end only writes its outputs again. Another configuration starts afresh.
"""

from __future__ import annotations

import csv
import hashlib
import json
import logging
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path, PurePosixPath
from typing import Any

import ray
import ray.train
import torch
import yaml
from pyarrow.fs import FileSelector, FileType, LocalFileSystem
from ray.train.torch import TorchTrainer
from safetensors.torch import save_file

from pipeline import cluster, data, journal, loop, recipe
from pipeline.checkpoint import Checkpoints, open_place
from pipeline.config import ConfigError, Experiment
from pipeline.files import read_json, write_json
from pipeline.worker import Task, work

logger = logging.getLogger(__name__)

HISTORY = ("epoch", "lr", "train/loss", "val/loss", "val/top1_pct", "val/top5_pct", "perf/img_per_s")
HISTORY_EMA = ("val/ema_loss", "val/ema_top1_pct", "val/ema_top5_pct")
_WEIGHTS = {loop.PLAIN: "weights.safetensors", loop.EMA: "weights_ema.safetensors"}
_NETWORKS = ("build", "convnext", "depthwise", "irreps", "layers", "products", "resmlp", "variants", "vit")
_TRAINING = ("augment", "data", "decode", "loop", "proxy", "recipe", "worker")
CODE = (*(f"flopeq/{name}.py" for name in _NETWORKS), *(f"pipeline/{name}.py" for name in _TRAINING))
"""Files whose change may change the weights."""
_MAX_FAILURES = 3  # of workers or nodes, until training must have got on
_RAY = "ray-"
# What leaves the weights as they are; of the data, because the shards' own fingerprint says it.
_UNFELT = {
    "train": {"workers", "cpus_per_worker", "gpu", "loader_workers", "batch_per_worker", "checkpoint_steps",
              "keep_checkpoints"},
    "data": {"name", "source", "labels", "on_bad_image", "images_per_shard", "cache_gib", "further_val"},
}


def train(experiment: Experiment, run_name: str) -> None:
    """Trains a run, or goes on with it, and writes outputs/<run>/ as the stage `train@<run>` declares.

    Raises:
        ConfigError, ShardError, ClusterError: what is wrong with the parameters, the data, the cluster.
    """
    shards = data.Shards(experiment.data.shards, cache_gib=experiment.data.cache_gib)
    settings, configuration = experiment.train, experiment.resolved(run_name)
    # What would otherwise fail on the workers, late.
    recipe.check(experiment.recipe(run_name), experiment.data, settings)
    _model(experiment, run_name, shards.num_classes, device="meta")
    cluster.connect(cpus=settings.least_workers * settings.cpus_per_worker)
    gpu = _gpu(experiment)
    place = _Place.of(experiment, run_name, fingerprint(configuration, shards))
    note = place.take_up()
    checkpoints = Checkpoints(place.checkpoints, keep=settings.keep_checkpoints)
    task = Task(experiment, run_name, str(Path.cwd()), place.checkpoints, place.stop)
    scaling = ray.train.ScalingConfig(
        num_workers=settings.workers,
        use_gpu=gpu,
        resources_per_worker={"CPU": settings.cpus_per_worker, **({"GPU": 1} if gpu else {})},
    )

    from pipeline import track  # not before the run is sure to start: importing MLflow takes seconds

    with _stopping_on_sigterm(place):
        mlflow_run_id = track.start_run(experiment, run_name, resume=note.get("mlflow_run_id"))
        place.write(mlflow_run_id, "running")
        status = "interrupted"
        try:
            with journal.following(place.journal, _telling(experiment, run_name, mlflow_run_id)) as callback:
                outcome = _fit(task, scaling, place.storage, callback, checkpoints)
            track.log_epochs(mlflow_run_id, outcome["history"])  # where an interruption came between
            if outcome["status"] == "stopped":
                logger.warning("%s was stopped, with a checkpoint: the same command goes on from there", run_name)
                sys.exit(128 + signal.SIGTERM)
            status = outcome["status"]
            weights = _weights(checkpoints, outcome, lambda: _model(experiment, run_name, shards.num_classes))
            _write_outputs(Path("outputs") / run_name, configuration, outcome, weights, place, mlflow_run_id)
            place.write(mlflow_run_id, status)
        finally:
            place.tidy()
            track.finish(mlflow_run_id, status)


def _fit(
    task: Task, scaling: ray.train.ScalingConfig, storage: str, callback: journal.Journal, checkpoints: Checkpoints
) -> dict[str, Any]:
    """What `work` returns on rank 0, however many workers and nodes fail, as long as training gets on between.

    Raises: what the workers raised, if it is an error for people; otherwise Ray's own.
    """
    while True:
        before = checkpoints.names()
        trainer = Trainer(
            lambda: work(task),
            scaling_config=scaling,
            run_config=ray.train.RunConfig(
                name=f"{_RAY}{time.time_ns()}",  # another name each time: Ray shall not restore what it remembers
                storage_path=storage,
                failure_config=ray.train.FailureConfig(max_failures=_MAX_FAILURES),
                callbacks=[callback],
            ),
        )
        try:
            outcome = trainer.fit().return_value
        except ray.train.TrainingFailedError as error:
            for cause in _causes(error):
                if type(cause).__module__.startswith("pipeline."):
                    raise cause from None
            if checkpoints.names()[-1:] == before[-1:]:
                raise
            logger.warning("%d failures: once more from the newest checkpoint", _MAX_FAILURES + 1)
        else:
            assert outcome is not None  # as rank 0's function has ended
            return outcome


def _causes(error: Exception) -> list[BaseException]:
    """What was raised on the workers."""
    failures = getattr(error, "worker_failures", {}).values()
    return [getattr(failure, "_base_exc", failure) for failure in failures]


@contextmanager
def _stopping_on_sigterm(place: _Place) -> Iterator[None]:
    """Turns SIGTERM, as a job gets it that is preempted, into the file that asks the workers to stop."""
    if threading.current_thread() is not threading.main_thread():  # only that one may handle signals
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda *_: place.ask_to_stop())
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class Trainer(TorchTrainer):
    """Ray's, but for what Ctrl-C does."""

    def _register_sigint_handler(self, controller: Any) -> None:
        """Ray's handler may exit with status 0. Python's ends the driver, and with it Ray's job."""


def fingerprint(configuration: Mapping[str, Any], shards: data.Shards) -> str:
    """A hash of all that the final weights are a function of: configuration, data, code, packages."""
    felt = {
        section: {key: value for key, value in configuration[section].items() if key not in unfelt}
        for section, unfelt in _UNFELT.items()
    }
    versions = [version(package) for package in ("ray", "simplejpeg", "timm", "torch")]
    described = [{**configuration, **felt}, versions, shards.fingerprint]
    digest = hashlib.sha256(json.dumps(described, sort_keys=True).encode())
    for path in CODE:
        digest.update(Path(__file__).parent.parent.joinpath(path).read_bytes())
    return digest.hexdigest()[:16]


@dataclass(frozen=True)
class _Place:
    """Where one configuration of a run keeps its checkpoints (`storage`) and its note (`notes`, always local)."""

    fingerprint: str
    storage: str
    notes: Path

    @classmethod
    def of(cls, experiment: Experiment, run_name: str, fingerprint: str) -> _Place:
        base = experiment.storage if "://" in experiment.storage else str(Path(experiment.storage).absolute())
        notes = Path("outputs", run_name, "checkpoints").absolute()
        return cls(fingerprint, f"{base}/{run_name}/checkpoints/{fingerprint}", notes / fingerprint)

    @property
    def checkpoints(self) -> str:
        """Folder or URL of the checkpoints of this configuration."""
        return f"{self.storage}/steps"

    @property
    def stop(self) -> str:
        """The file that asks the workers to stop."""
        return f"{self.storage}/stop"

    @property
    def journal(self) -> Path:
        """Where the driver hears of the workers."""
        return self.notes / "journal.jsonl"

    def take_up(self) -> dict[str, str]:
        """The note of an earlier training of this configuration; what lies here of others is removed."""
        files, root = open_place(self.storage)
        for system, folder in ((files, root), (LocalFileSystem(), str(self.notes))):
            above = str(PurePosixPath(folder).parent)
            for entry in system.get_file_info(FileSelector(above, allow_not_found=True)):
                if entry.type == FileType.Directory and entry.base_name != self.fingerprint:
                    system.delete_dir(entry.path)
        files.create_dir(root, recursive=True)
        self.tidy()
        return read_json(self.notes / "run.json", {})

    def ask_to_stop(self) -> None:
        """Makes the file that asks the workers to stop."""
        files, path = open_place(self.stop)
        files.open_output_stream(path).close()

    def write(self, mlflow_run_id: str, status: str) -> None:
        """Notes how the training stands, and in which MLflow run."""
        write_json(self.notes / "run.json", {"mlflow_run_id": mlflow_run_id, "status": status})

    def tidy(self) -> None:
        """Removes Ray's own notes, which nothing reads, and the wish to stop."""
        files, root = open_place(self.storage)
        for entry in files.get_file_info(FileSelector(root, allow_not_found=True)):
            if entry.base_name.startswith(_RAY):
                files.delete_dir(entry.path)
            elif entry.base_name == PurePosixPath(self.stop).name:
                files.delete_file(entry.path)


def _gpu(experiment: Experiment) -> bool:
    """Whether each worker gets a GPU. Raises ClusterError for a cluster too small, on which Ray would wait."""
    settings, has = experiment.train, ray.cluster_resources()
    gpu = has.get("GPU", 0) > 0 if settings.gpu == "auto" else settings.gpu
    workers = settings.least_workers
    for kind, needed in (("CPU", workers * settings.cpus_per_worker), ("GPU", workers * gpu)):
        if has.get(kind, 0) < needed:
            raise cluster.ClusterError(
                f"train.workers {workers} x train.cpus_per_worker {settings.cpus_per_worker} needs {needed} "
                f"{kind}s, but the Ray cluster has {has.get(kind, 0):.0f}: lower them, or unset RAY_ADDRESS"
            )
    if settings.amp == "fp16" and not gpu:
        raise ConfigError("train.amp: fp16 needs a GPU; on CPU use bf16 or off")
    return gpu


def _model(experiment: Experiment, run_name: str, num_classes: int, device: str = "cpu") -> torch.nn.Module:
    return recipe.model(experiment.run(run_name), experiment.recipe(run_name), num_classes=num_classes,
                        seed=experiment.seed_of(run_name), device=device)


def _telling(experiment: Experiment, run_name: str, mlflow_run_id: str) -> Callable[[dict[str, Any]], None]:
    """What to do with every entry of the journal: a line for people; MLflow for an epoch's metrics."""
    from pipeline import track

    described, first = experiment.recipe(run_name), []

    def tell(entry: dict[str, Any]) -> None:
        if "failed" in entry:
            told = "; ".join(f"rank {rank}: {message}" for rank, message in entry["failed"].items())
            logger.warning("%s lost workers, and starts them anew (%s)", run_name, told)
        elif "start_step" in entry:
            first.clear()
            _tell_start(run_name, entry, described.global_batch_size)
        else:
            now, epoch, left = time.monotonic(), entry["epoch"], described.epochs - entry["epoch"] - 1
            first[:] = first or [epoch, now]
            eta = "" if epoch <= first[0] else f"  ETA {(now - first[1]) / (epoch - first[0]) * left:.0f} s"
            logger.info(
                "%s  epoch %d/%d  lr %.2e  loss %.4f  top-1 %.2f %%  %.0f img/s%s", run_name, epoch + 1,
                described.epochs, entry["lr"], entry["train/loss"], entry["val/top1_pct"], entry["perf/img_per_s"], eta,
            )
            track.log_epoch(mlflow_run_id, entry)

    return tell


def _tell_start(run_name: str, entry: dict[str, Any], global_batch_size: int) -> None:
    for name, fault in entry["passed_over"].items():
        logger.warning("%s: checkpoint %s is passed over: %s", run_name, name, fault)
    logger.info(
        "%s %s step %d of %d  workers %d  images %d a step, %d at once a worker", run_name,
        "goes on from" if entry["start_step"] else "starts at", entry["start_step"], entry["steps"], entry["workers"],
        global_batch_size, entry["batch_size"],
    )


def _weights(
    checkpoints: Checkpoints, outcome: dict[str, Any], initial: Callable[[], torch.nn.Module]
) -> dict[str, dict[str, torch.Tensor]]:
    """The best weights of each name: of the last checkpoint, or the initial ones where it diverged before the first."""
    newest = checkpoints.newest()
    if newest is not None:
        return checkpoints.load(newest)[1]
    return {name: loop.weights_of(initial()) for name in outcome["best_epoch"]}


def _write_outputs(
    folder: Path, configuration: dict[str, Any], outcome: dict[str, Any],
    weights: dict[str, dict[str, torch.Tensor]], place: _Place, mlflow_run_id: str,
) -> None:
    """What the stage declares: weights.safetensors, history.csv, run.json, config.yaml; weights_ema.safetensors too."""
    if outcome["status"] == "diverged":
        logger.warning("%s diverged: %s", configuration["run"], outcome["message"])
    for name, kept in weights.items():
        save_file(kept, folder / _WEIGHTS[name])
    averaged = HISTORY_EMA if loop.EMA in outcome["best_epoch"] else ()
    with (folder / "history.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, (*HISTORY, *averaged), lineterminator="\n")
        table.writeheader()
        table.writerows(outcome["history"])
    (folder / "config.yaml").write_text(yaml.safe_dump(configuration, sort_keys=False))
    from pipeline import track

    files = [folder / file for file in (*(_WEIGHTS[name] for name in weights), "config.yaml")]
    track.log_final(mlflow_run_id, {}, files)
    write_json(folder / "run.json", {
        "run": configuration["run"],
        "mlflow_run_id": mlflow_run_id,
        "fingerprint": place.fingerprint,
        "status": outcome["status"],
        "message": outcome["message"],
        "best_epoch": outcome["best_epoch"][loop.PLAIN],
    })
