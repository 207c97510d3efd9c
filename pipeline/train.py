"""Training a run of the experiment with Ray Train: workers, checkpoints, what is left in outputs/<run>.

A configuration's fingerprint names its folder of checkpoints. There Ray keeps the newest checkpoints, each with
the best weights so far, and `run.json` says which MLflow run it is and whether it ended. A training that did not
end goes on from its last checkpoint, in its MLflow run; everything else starts afresh.
"""

from __future__ import annotations

import csv
import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow.fs
import ray
import ray.train
import torch
import torch.distributed
import yaml
from ray.train.torch import TorchTrainer, get_device, prepare_model
from safetensors.torch import load_file, save_file

import flopeq
from pipeline import cluster, data, journal, loop, proxy, recipe
from pipeline.config import ConfigError, Experiment

logger = logging.getLogger(__name__)

HISTORY = ("epoch", "lr", "train/loss", "val/loss", "val/top1_pct", "val/top5_pct", "perf/img_per_s")
HISTORY_EMA = ("val/ema_loss", "val/ema_top1_pct", "val/ema_top5_pct")
_WEIGHTS = {loop.PLAIN: "weights.safetensors", loop.EMA: "weights_ema.safetensors"}
_CODE = ("augment", "data", "decode", "loop", "proxy", "recipe")
# What leaves the weights as they are; of the data, because the shards' own fingerprint says it.
_UNFELT = {
    "train": {"keep_checkpoints", "loader_workers"},
    "data": {"name", "source", "labels", "on_bad_image", "images_per_shard", "cache_gib", "further_val"},
}


def train(experiment: Experiment, run_name: str) -> None:
    """Trains a run, or goes on with it, and writes outputs/<run>/ as the stage `train@<run>` declares.

    Raises:
        ConfigError, ShardError, ClusterError: what is wrong with the parameters, the data, the cluster.
    """
    shards = data.Shards(experiment.data.shards)
    settings, configuration = experiment.train, experiment.resolved(run_name)
    num_classes = len(shards.classes)
    # What would otherwise fail on the workers, late.
    recipe.check(experiment.recipe(run_name), experiment.data, settings.workers)
    _model(experiment, run_name, num_classes, device="meta")
    cluster.connect(cpus=settings.workers * settings.cpus_per_worker)
    gpu = _gpu(experiment)
    place = _Place.of(experiment, run_name, fingerprint(configuration, shards))
    note = place.take_up()

    from pipeline import track  # not before the run is sure to start: importing MLflow takes seconds

    mlflow_run_id = track.start_run(experiment, run_name, resume=note.get("mlflow_run_id"))
    place.write(mlflow_run_id, "running")
    status = "interrupted"
    try:
        with journal.following(_telling(experiment, run_name, mlflow_run_id)) as callback:
            result = Trainer(
                work,
                train_loop_config={"experiment": experiment, "run": run_name, "root": str(Path.cwd())},
                scaling_config=ray.train.ScalingConfig(
                    num_workers=settings.workers,
                    use_gpu=gpu,
                    resources_per_worker={"CPU": settings.cpus_per_worker, **({"GPU": 1} if gpu else {})},
                ),
                run_config=ray.train.RunConfig(
                    name=place.fingerprint,
                    storage_path=place.storage,
                    checkpoint_config=ray.train.CheckpointConfig(num_to_keep=settings.keep_checkpoints),
                    failure_config=ray.train.FailureConfig(max_failures=2),
                    callbacks=[callback],
                ),
            ).fit()
        outcome = result.return_value
        assert outcome is not None  # of rank 0, whose function ended: `fit` has raised otherwise
        status = outcome["status"]
        _write_outputs(Path("outputs") / run_name, configuration, outcome, place, mlflow_run_id, result.checkpoint,
                       initial=lambda: _model(experiment, run_name, num_classes))
        kept = [_WEIGHTS[name] for name in outcome["best_epoch"]]
        track.log_final(mlflow_run_id, {}, [Path("outputs") / run_name / file for file in (*kept, "config.yaml")])
        place.write(mlflow_run_id, status)
    finally:
        track.finish(mlflow_run_id, status)


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
    here = Path(__file__).parent
    for path in (*sorted(Path(flopeq.__file__).parent.glob("*.py")), *(here / f"{module}.py" for module in _CODE)):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


@dataclass(frozen=True)
class _Place:
    """Where one configuration of a run keeps its checkpoints (`storage`) and its note (`notes`, always local)."""

    fingerprint: str
    storage: str
    notes: Path

    @classmethod
    def of(cls, experiment: Experiment, run_name: str, fingerprint: str) -> _Place:
        notes = Path("outputs", run_name, "checkpoints").absolute()
        base = experiment.storage if "://" in experiment.storage else str(Path(experiment.storage).absolute())
        return cls(fingerprint, f"{base}/{run_name}/checkpoints", notes)

    def take_up(self) -> dict[str, str]:
        """The note of an unfinished training of this configuration; all else that lies here is removed."""
        path = self.notes / self.fingerprint / "run.json"
        note = json.loads(path.read_text()) if path.is_file() else {}
        filesystem, root = pyarrow.fs.FileSystem.from_uri(self.storage)
        keep = note.get("status") == "running" and _restorable(filesystem, f"{root}/{self.fingerprint}")
        for kept, folder in ((keep, root), (keep, str(self.notes))):
            system = filesystem if folder == root else pyarrow.fs.LocalFileSystem()
            for entry in system.get_file_info(pyarrow.fs.FileSelector(folder, allow_not_found=True)):
                if entry.type == pyarrow.fs.FileType.Directory and not (kept and entry.base_name == self.fingerprint):
                    system.delete_dir(entry.path)
        return note if keep else {}

    def write(self, mlflow_run_id: str, status: str) -> None:
        _write_json(self.notes / self.fingerprint / "run.json", {"mlflow_run_id": mlflow_run_id, "status": status})


def _restorable(filesystem: pyarrow.fs.FileSystem, folder: str) -> bool:
    """Whether Ray can read its own notes there: it writes them in place, and a kill may have cut them."""
    path = f"{folder}/checkpoint_manager_snapshot.json"
    if filesystem.get_file_info(path).type == pyarrow.fs.FileType.NotFound:
        return True
    with filesystem.open_input_stream(path) as file:
        try:
            json.loads(file.read())
        except ValueError:
            logger.warning("%s was cut when the training was interrupted: it starts over", path)
            return False
    return True


def _gpu(experiment: Experiment) -> bool:
    """Whether each worker gets a GPU. Raises ClusterError for a cluster too small, on which Ray would wait."""
    settings, has = experiment.train, ray.cluster_resources()
    gpu = has.get("GPU", 0) > 0 if settings.gpu == "auto" else settings.gpu
    for kind, needed in (("CPU", settings.workers * settings.cpus_per_worker), ("GPU", settings.workers * gpu)):
        if has.get(kind, 0) < needed:
            raise cluster.ClusterError(
                f"train.workers {settings.workers} x train.cpus_per_worker {settings.cpus_per_worker} needs {needed} "
                f"{kind}s, but the Ray cluster has {has.get(kind, 0):.0f}: lower them, or unset RAY_ADDRESS"
            )
    if settings.amp == "fp16" and not gpu:
        raise ConfigError("train.amp: fp16 needs a GPU; on CPU use bf16 or off")
    return gpu


def _model(experiment: Experiment, run_name: str, num_classes: int, device: str = "cpu") -> torch.nn.Module:
    return recipe.model(experiment.run(run_name), experiment.recipe(run_name), num_classes=num_classes,
                        seed=experiment.seed_of(run_name), device=device)


class RayTrain:
    """What a worker is told by Ray Train, and tells it; pipeline/trial.py has another with the same members."""

    def __init__(self) -> None:
        context = ray.train.get_context()
        self.rank, self.world_size = context.get_world_rank(), context.get_world_size()
        self.device = get_device()

    def checkpoint(self) -> ray.train.Checkpoint | None:
        """What to go on from."""
        return ray.train.get_checkpoint()

    def report(self, row: dict[str, Any], folder: str | None, name: str | None) -> None:
        """Ends an epoch: its metrics, and on rank 0 the folder of its checkpoint and what to call that."""
        checkpoint = ray.train.Checkpoint.from_directory(folder) if folder else None
        ray.train.report(row, checkpoint=checkpoint, checkpoint_dir_name=name)


def work(config: dict[str, Any]) -> dict[str, Any]:
    """One worker's training. Returns how it ended and its history.

    Args:
        config: `experiment`, `run`, `root` (the repository), and for the trials of a sweep `classes` (see
            pipeline/proxy.py) and `link` (None: Ray Train's).
    """
    experiment, run_name = config["experiment"], config["run"]
    settings, recipe_, seed = experiment.train, experiment.recipe(run_name), experiment.seed_of(run_name)
    link = config.get("link") or RayTrain()
    rank, world_size, device = link.rank, link.world_size, link.device
    torch.set_num_threads(settings.cpus_per_worker)
    shards = data.Shards(Path(config["root"]) / experiment.data.shards)
    images, num_classes = proxy.images(shards, config.get("classes"))
    model = _model(experiment, run_name, num_classes).to(device)
    steps_per_epoch = data.steps_per_epoch(len(images["train"]), recipe_.global_batch_size)
    amp = settings.amp if recipe_.mixed_precision else "off"
    training = loop.Training.start(model, recipe_, steps_per_epoch=steps_per_epoch, amp=amp)
    if checkpoint := link.checkpoint():
        with checkpoint.as_directory() as folder:
            state = torch.load(Path(folder, "state.pt"), map_location=device, weights_only=True)
            training.load_state_dict(state, {name: load_file(Path(folder, _WEIGHTS[name])) for name in training.best})

    def report(training: loop.Training) -> None:
        row = training.history[-1]
        if rank:
            return link.report(row, None, None)
        with tempfile.TemporaryDirectory() as folder:
            torch.save(training.state_dict(), Path(folder, "state.pt"))
            for name, best in training.best.items():
                save_file(best.weights, Path(folder, _WEIGHTS[name]))
            link.report(row, folder, f"epoch-{training.epoch:04d}")

    mine = {"rank": rank, "world_size": world_size}
    theirs = {**mine, "loader_workers": settings.loader_workers, "device": device}
    status, message = "finished", None
    try:
        loop.fit(
            training,
            recipe_,
            train_batches=lambda epoch, start_step: data.train_batches(
                images["train"], recipe_, experiment.data, seed=seed, epoch=epoch, start_step=start_step, **theirs
            ),
            val_batches=lambda: data.val_batches(
                images["val"], recipe_, experiment.data,
                batch_size=recipe_.global_batch_size // world_size, **theirs,
            ),
            on_epoch=report,
            num_classes=num_classes,
            seed=seed,
            names=images["train"].keys,
            amp=amp,
            forward=_forward(model, device, compile=settings.compile, world_size=world_size),
            all_reduce=_all_reduce if world_size > 1 else lambda sums: sums,
            **mine,
        )
    except loop.NonFiniteLoss as error:
        status, message = "diverged", str(error)
    return {"status": status, "message": message, "history": training.history,
            "best_epoch": {name: best.epoch for name, best in training.best.items()}}


def _forward(
    model: torch.nn.Module, device: torch.device, *, compile: bool, world_size: int
) -> Callable[[torch.Tensor], torch.Tensor]:
    """The model as training calls it: under DDP when there are several workers, compiled when that is asked for."""
    if world_size > 1:
        model = prepare_model(model, move_to_device=False)
    if compile:
        from flopeq.benchmark import can_compile

        return torch.compile(model) if can_compile(device) else model
    return model


def _all_reduce(sums: torch.Tensor) -> torch.Tensor:
    torch.distributed.all_reduce(sums)
    return sums


def _telling(experiment: Experiment, run_name: str, mlflow_run_id: str) -> Callable[[dict[str, Any]], None]:
    """What to do with every epoch's metrics: a line for people, MLflow for the rest."""
    from pipeline import track

    epochs, first = experiment.recipe(run_name).epochs, []

    def tell(row: dict[str, Any]) -> None:
        now, epoch = time.monotonic(), row["epoch"]
        first[:] = first or [epoch, now]
        eta = "" if epoch <= first[0] else f"  ETA {(now - first[1]) / (epoch - first[0]) * (epochs - epoch - 1):.0f} s"
        logger.info(
            "%s  epoch %d/%d  lr %.2e  loss %.4f  top-1 %.2f %%  %.0f img/s%s", run_name, epoch + 1, epochs,
            row["lr"], row["train/loss"], row["val/top1_pct"], row["perf/img_per_s"], eta,
        )
        track.log_epoch(mlflow_run_id, row, epoch)

    return tell


def _write_outputs(
    folder: Path, configuration: dict[str, Any], outcome: dict[str, Any], place: _Place, mlflow_run_id: str,
    checkpoint: ray.train.Checkpoint | None, initial: Callable[[], torch.nn.Module],
) -> None:
    """What the stage declares: weights.safetensors, history.csv, run.json, config.yaml; weights_ema.safetensors too."""
    if outcome["status"] == "diverged":
        logger.warning("%s diverged: %s", configuration["run"], outcome["message"])
    for file in (_WEIGHTS[name] for name in outcome["best_epoch"]):
        if checkpoint is None:  # diverged in its first epoch
            save_file(loop.weights_of(initial()), folder / file)
        else:
            with checkpoint.as_directory() as path:
                shutil.copyfile(Path(path, file), folder / file)
    averaged = HISTORY_EMA if loop.EMA in outcome["best_epoch"] else ()
    with (folder / "history.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, (*HISTORY, *averaged), lineterminator="\n")
        table.writeheader()
        table.writerows(outcome["history"])
    (folder / "config.yaml").write_text(yaml.safe_dump(configuration, sort_keys=False))
    _write_json(folder / "run.json", {
        "run": configuration["run"],
        "mlflow_run_id": mlflow_run_id,
        "fingerprint": place.fingerprint,
        "status": outcome["status"],
        "best_epoch": outcome["best_epoch"][loop.PLAIN],
    })


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(content, indent=2) + "\n")
    os.replace(partial, path)
