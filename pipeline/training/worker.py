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
from pipeline.loading import batching, datasets
from pipeline.shards import manifests
from pipeline.training import batch_size, device_settings, image_losses, loop, recipe
from pipeline.training.checkpoints import CheckpointManager
from pipeline.training.step_log import StepLog
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
    log_steps: bool = False
    """Whether rank 0 reports numbers of single steps, as `steps`, with each epoch and each checkpoint within one."""
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
    model = recipe.build_model(experiment.run(task.run), recipe_, num_classes=num_classes, seed=seed)
    model = device_settings.apply_model_settings(model, settings)
    by_steps = task.step_training
    if by_steps is not None:
        rows = datasets.stratified_rows(images["train"].labels, by_steps.unique_images, seed)
        images["train"] = images["train"].select(rows)
    steps_per_pass = batching.steps_per_epoch(len(images["train"]), recipe_.global_batch_size)
    steps_per_epoch = steps_per_pass if by_steps is None else by_steps.steps
    amp = settings.amp if recipe_.mixed_precision else None
    compiled = settings.compile and can_compile(device)
    step = batch_size.TrialStep(recipe_, experiment.data.image_size, num_classes, device, amp, compiled, world_size)
    images_per_pass = _microbatch_size(task, model, step, rank)  # before the GPU has anything else
    model = model.to(device)
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
        training.load_state_dict(*checkpoints.load(latest))
    forward, no_sync = _wrap_model(model, compile=compiled, world_size=world_size)
    context.report(
        {
            "start_step": training.step,
            "num_steps": steps_per_epoch * recipe_.epochs,
            "workers": world_size,
            "batch_size": images_per_pass,
            "compiled": compiled,
            "passed_over": checkpoints.skipped,
        }
    )

    def save(training: loop.TrainState) -> None:
        if rank == 0:
            best = {name: best.weights for name, best in training.best.items()}
            checkpoints.save(training.step, training.state_dict(), best)

    steps = StepLog(device) if task.log_steps else None

    def on_step_end(training: loop.TrainState) -> None:
        if settings.checkpoint_steps and training.step % settings.checkpoint_steps == 0:
            save(training)
            if steps is not None:
                context.report({"steps": steps.take()})  # every rank reports

    def on_epoch_end(training: loop.TrainState) -> None:
        save(training)
        context.report(training.history[-1] | ({} if steps is None else {"steps": steps.take()}))

    rank_args = {"rank": rank, "world_size": world_size}
    loader_args = {"batch_size": images_per_pass, "loader_workers": settings.loader_workers, "device": device}
    status, message = "finished", None
    with (
        batching.BatchLoader(images, recipe_, experiment.data, **loader_args, **rank_args) as loader,
        _watch_stop_file(task.stop_file) if rank == 0 else nullcontext(lambda: False) as should_stop,
    ):

        def train_batches(epoch: int, start_step: int) -> Iterable[batching.Batch]:
            return loader.train_batches(seed=seed, epoch=epoch, start_step=start_step)

        def val_batches() -> Iterable[batching.Batch]:
            return loader.val_batches() if by_steps is None else by_steps.orient(loader.val_batches())

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
                step_log=steps if rank == 0 else None,
                all_reduce=_all_reduce if world_size > 1 else lambda sums: sums,
                **rank_args,
            )
        except loop.NonFiniteLossError as error:
            status, message = "diverged", str(error)
        except loop.TrainingStopped:
            status = "stopped"
            save(training)
        losses = None
        if by_steps is not None and status == "finished":
            part = image_losses.measure_image_losses(model, val_batches(), average_over_flop=by_steps.average_over_flop)
            losses = image_losses.concatenate(_gather(part, world_size))
    checkpoints.wait()
    return {
        "status": status,
        "message": message,
        "history": training.history,
        "best_epoch": {name: best.epoch for name, best in training.best.items()},
        "compiled": compiled,
        **({} if losses is None else {"image_losses": losses}),
    }


def _microbatch_size(task: WorkerTask, model: torch.nn.Module, step: batch_size.TrialStep, rank: int) -> int:
    """Returns the number of images per forward pass. A rank's larger part of the global batch takes several passes.

    Args:
        model: the network, not on the GPU yet.
    """
    requested, share = task.experiment.train.batch_per_worker, batch_size.share_of_rank(step.recipe, step.world_size)
    if requested != "auto":
        return min(requested, share)
    if step.device.type != "cuda":
        return share
    saved = batch_size.SavedBatchSize(task.checkpoints, step)
    found = _broadcast_from_rank_0(saved.load() if rank == 0 else None, step.world_size)
    if found is not None:
        return found
    sizes = batch_size.candidate_batch_sizes(share, step.recipe.mixup_group)
    found = batch_size.find_max_batch_size(model, step, sizes)
    if step.world_size > 1:
        smallest = torch.tensor(found, device=step.device)
        torch.distributed.all_reduce(smallest, op=torch.distributed.ReduceOp.MIN)
        found = int(smallest)
    if rank == 0:
        saved.save(found)
    return found


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
