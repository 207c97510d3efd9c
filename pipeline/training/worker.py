"""The training function that Ray Train runs on each worker."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray.train
import torch
import torch.distributed
from pyarrow.fs import FileType
from ray.train.torch import get_device, prepare_model
from torch.nn.parallel import DistributedDataParallel

from flopeq.hardware import can_compile
from pipeline.base.config import Experiment
from pipeline.base.files import open_filesystem
from pipeline.base.schema import Recipe
from pipeline.loading import batching, datasets
from pipeline.shards import manifests
from pipeline.training import device_settings, image_losses, loop, recipe
from pipeline.training.checkpoints import CheckpointManager
from pipeline.training.step_training import StepTraining

_POLL_S = 1.0


@dataclass(frozen=True)
class WorkerTask:
    """The arguments of a worker."""

    experiment: Experiment
    run: str
    root: str
    """The repository's folder."""
    checkpoints: str
    """Folder or URL of the checkpoints."""
    stop_file: str
    """Path or URL of the stop file: when it appears, the training saves a checkpoint and ends."""
    classes: int | None = None
    """Number of classes of the data, which pipeline/loading/datasets.py chooses; None: all."""
    step_training: StepTraining | None = None
    """Length and images of a training of the scaling study; None: those of the recipe and of the data set."""


class RayTrainContext:
    """A worker's connection to Ray Train. A trial in its own process has a LocalContext with the same members."""

    def __init__(self) -> None:
        context = ray.train.get_context()
        self.rank, self.world_size = context.get_world_rank(), context.get_world_size()
        self.device = get_device()

    def report(self, metrics: dict[str, Any]) -> None:
        """Reports metrics; every rank calls it."""
        ray.train.report(metrics)


def train_loop_per_worker(task: WorkerTask, context: Any = None) -> dict[str, Any]:
    """Trains from the latest checkpoint, or from the beginning. Returns the status, the history and the best epochs.

    Args:
        context: rank, world size, device and `report`, as in RayTrainContext; None: Ray Train's.
    """
    context = context or RayTrainContext()
    experiment, recipe_, seed = task.experiment, task.experiment.recipe(task.run), task.experiment.seed_of(task.run)
    settings, rank, world_size, device = experiment.train, context.rank, context.world_size, context.device
    torch.set_num_threads(settings.cpus_per_worker)
    device_settings.apply_backend_settings(settings)
    shards = manifests.Shards(Path(task.root) / experiment.data.shards, cache_gib=experiment.data.cache_gib)
    images, num_classes = datasets.load_splits(shards, task.classes)
    model = recipe.build_model(experiment.run(task.run), recipe_, num_classes=num_classes, seed=seed).to(device)
    model = device_settings.apply_model_settings(model, settings)
    by_steps = task.step_training
    if by_steps is not None:
        rows = datasets.stratified_rows(images["train"].labels, by_steps.unique_images, seed)
        images["train"] = images["train"].select(rows)
    steps_per_pass = batching.steps_per_epoch(len(images["train"]), recipe_.global_batch_size)
    steps_per_epoch = steps_per_pass if by_steps is None else by_steps.steps
    amp = settings.amp if recipe_.mixed_precision else None
    training = loop.TrainState.create(
        model,
        recipe_,
        steps_per_epoch=steps_per_epoch,
        amp=amp,
        warmup_steps=None if by_steps is None else by_steps.warmup_steps,
    )
    checkpoints = CheckpointManager(task.checkpoints, keep=settings.keep_checkpoints)
    latest = _broadcast_from_rank_0(checkpoints.latest() if rank == 0 else None, world_size)
    if latest is not None:
        training.load_state_dict(*checkpoints.load(latest, device))
    batch_size = _microbatch_size(task.experiment, recipe_, model, amp, num_classes, world_size, device)
    compiled = settings.compile and can_compile(device)
    forward, no_sync = _wrap_model(model, compile=compiled, world_size=world_size)
    context.report(
        {
            "start_step": training.step,
            "steps": steps_per_epoch * recipe_.epochs,
            "workers": world_size,
            "batch_size": batch_size,
            "compiled": compiled,
            "passed_over": checkpoints.skipped,
        }
    )

    def save(training: loop.TrainState) -> None:
        if rank == 0:
            best = {name: best.weights for name, best in training.best.items()}
            checkpoints.save(training.step, training.state_dict(), best)

    def on_step_end(training: loop.TrainState) -> None:
        if settings.checkpoint_steps and training.step % settings.checkpoint_steps == 0:
            save(training)

    def on_epoch_end(training: loop.TrainState) -> None:
        save(training)
        context.report(training.history[-1])

    rank_args = {"rank": rank, "world_size": world_size}
    loader_args = {**rank_args, "loader_workers": settings.loader_workers, "device": device}

    def train_batches(epoch: int, start_step: int) -> Iterable[batching.Batch]:
        return batching.train_batches(
            images["train"],
            recipe_,
            experiment.data,
            seed=seed,
            epoch=epoch,
            start_step=start_step,
            batch_size=batch_size,
            **loader_args,
        )

    def val_batches() -> Iterable[batching.Batch]:
        batches = batching.val_batches(images["val"], recipe_, experiment.data, batch_size=batch_size, **loader_args)
        return batches if by_steps is None else by_steps.orient(batches)

    status, message = "finished", None
    with _watch_stop_file(task.stop_file) if rank == 0 else nullcontext(lambda: False) as should_stop:
        try:
            loop.fit(
                training,
                recipe_,
                train_batches=train_batches
                if by_steps is None
                else lambda _, start_step: by_steps.iterate(train_batches, start_step, steps_per_pass),
                val_batches=val_batches,
                on_step=on_step_end,
                on_epoch=on_epoch_end,
                should_stop=should_stop,
                num_classes=num_classes,
                seed=seed,
                image_names=images["train"].keys,
                amp=amp,
                forward=forward,
                no_sync=no_sync,
                all_reduce=_all_reduce if world_size > 1 else lambda sums: sums,
                **rank_args,
            )
        except loop.NonFiniteLossError as error:
            status, message = "diverged", str(error)
        except loop.TrainingStopped:
            status = "stopped"
            save(training)
    checkpoints.wait()
    losses = None
    if by_steps is not None and status == "finished":
        part = image_losses.measure_image_losses(model, val_batches(), average_over_flop=by_steps.average_over_flop)
        losses = image_losses.concatenate(_gather(part, world_size))
    return {
        "status": status,
        "message": message,
        "history": training.history,
        "best_epoch": {name: best.epoch for name, best in training.best.items()},
        "compiled": compiled,
        **({} if losses is None else {"image_losses": losses}),
    }


def _microbatch_size(
    experiment: Experiment,
    recipe_: Recipe,
    model: torch.nn.Module,
    amp: str | None,
    num_classes: int,
    world_size: int,
    device: torch.device,
) -> int:
    """Returns the number of images per forward pass. A rank's larger part of the global batch takes several passes."""
    requested = experiment.train.batch_per_worker
    share = -(-recipe_.global_batch_size // recipe_.mixup_group // world_size) * recipe_.mixup_group
    if requested != "auto":
        return min(requested, share)
    if device.type != "cuda":
        return share
    sizes = device_settings.candidate_batch_sizes(share, recipe_.mixup_group)
    max_size = device_settings.find_max_batch_size(
        model, recipe_, sizes, image_size=experiment.data.image_size, num_classes=num_classes, amp=amp
    )
    if world_size == 1:
        return max_size
    min_size = torch.tensor(max_size, device=device)
    torch.distributed.all_reduce(min_size, op=torch.distributed.ReduceOp.MIN)
    return int(min_size)


def _wrap_model(
    model: torch.nn.Module, *, compile: bool, world_size: int
) -> tuple[Callable[[torch.Tensor], torch.Tensor], Callable[[], AbstractContextManager]]:
    """Returns the model as training calls it (in DDP if there are several workers) and DDP's `no_sync`."""
    no_sync: Callable[[], AbstractContextManager] = nullcontext
    if world_size > 1:
        # With find_unused_parameters, DDP keeps its first reduction order. Without it, DDP changes the order after the
        # first step, and a resumed run would sum gradients in a different order than an uninterrupted run.
        model = prepare_model(model, move_to_device=False, parallel_strategy_kwargs={"find_unused_parameters": True})
        assert isinstance(model, DistributedDataParallel)
        no_sync = model.no_sync
    return (torch.compile(model) if compile else model), no_sync


def _broadcast_from_rank_0(value: Any, world_size: int) -> Any:
    """Returns rank 0's value on every rank."""
    values = [value]
    if world_size > 1:
        torch.distributed.broadcast_object_list(values, src=0)
    return values[0]


def _gather(value: Any, world_size: int) -> list[Any]:
    """Returns the values of all ranks, in their order."""
    values = [value]
    if world_size > 1:
        values = [None] * world_size
        torch.distributed.all_gather_object(values, value)
    return values


def _all_reduce(sums: torch.Tensor) -> torch.Tensor:
    torch.distributed.all_reduce(sums)
    return sums


@contextmanager
def _watch_stop_file(path: str) -> Iterator[Callable[[], bool]]:
    """Yields a function that says whether a file has appeared. A thread checks once a second."""
    stop_requested, ended = threading.Event(), threading.Event()
    files, path = open_filesystem(path)

    def poll() -> None:
        while not ended.wait(_POLL_S):
            with suppress(OSError):  # the storage may be temporarily unavailable
                if files.get_file_info(path).type != FileType.NotFound:
                    stop_requested.set()
                    return

    thread = threading.Thread(target=poll, daemon=True)
    thread.start()
    try:
        yield stop_requested.is_set
    finally:
        ended.set()
        thread.join()
