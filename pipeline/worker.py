"""One worker of a training: what Ray Train runs on each of them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
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

from pipeline import data, execution, loop, memory, proxy, recipe
from pipeline.checkpoint import Checkpoints, open_place
from pipeline.config import Experiment, Recipe

_POLL_S = 1.0


@dataclass(frozen=True)
class Task:
    """What a worker is to do."""

    experiment: Experiment
    run: str
    root: str
    """The repository's folder."""
    checkpoints: str
    """Where its checkpoints lie: a folder or URL."""
    stop: str
    """A file, at a path or URL, whose appearance asks the training to write a checkpoint and end."""
    classes: int | None = None
    """So many classes of the data, as pipeline/proxy.py chooses them; None: all."""


class RayTrain:
    """What a worker is told by Ray Train, and tells it. A trial's own process has another, with the same members."""

    def __init__(self) -> None:
        context = ray.train.get_context()
        self.rank, self.world_size = context.get_world_rank(), context.get_world_size()
        self.device = get_device()

    def report(self, metrics: dict[str, Any]) -> None:
        """How training stands, on every rank."""
        ray.train.report(metrics)


def work(task: Task, link: Any = None) -> dict[str, Any]:
    """Trains from the newest checkpoint, or from the start. Returns how it ended, and its history.

    Args:
        link: the way to who started it, with RayTrain's members; None: Ray Train.
    """
    link = link or RayTrain()
    experiment, recipe_, seed = task.experiment, task.experiment.recipe(task.run), task.experiment.seed_of(task.run)
    settings, rank, world_size, device = experiment.train, link.rank, link.world_size, link.device
    torch.set_num_threads(settings.cpus_per_worker)
    execution.settle(settings)
    shards = data.Shards(Path(task.root) / experiment.data.shards, cache_gib=experiment.data.cache_gib)
    images, num_classes = proxy.images(shards, task.classes)
    model = recipe.model(experiment.run(task.run), recipe_, num_classes=num_classes, seed=seed).to(device)
    model = execution.arrange(model, settings)
    steps_per_epoch = data.steps_per_epoch(len(images["train"]), recipe_.global_batch_size)
    amp = settings.amp if recipe_.mixed_precision else "off"
    training = loop.Training.start(model, recipe_, steps_per_epoch=steps_per_epoch, amp=amp)
    checkpoints = Checkpoints(task.checkpoints, keep=settings.keep_checkpoints)
    newest = _from_rank_0(checkpoints.newest() if rank == 0 else None, world_size)
    if newest is not None:
        training.load_state_dict(*checkpoints.load(newest, device))
    batch_size = _batch_size(task.experiment, recipe_, model, amp, num_classes, world_size)
    forward, no_sync = _forward(model, device, compile=settings.compile, world_size=world_size)
    link.report({
        "start_step": training.step, "steps": steps_per_epoch * recipe_.epochs, "workers": world_size,
        "batch_size": batch_size, "passed_over": checkpoints.passed_over,
    })

    def save(training: loop.Training) -> None:
        if rank == 0:
            best = {name: best.weights for name, best in training.best.items()}
            checkpoints.save(training.step, training.state_dict(), best)

    def after_step(training: loop.Training) -> None:
        if settings.checkpoint_steps and training.step % settings.checkpoint_steps == 0:
            save(training)

    def after_epoch(training: loop.Training) -> None:
        save(training)
        link.report(training.history[-1])

    mine = {"rank": rank, "world_size": world_size}
    theirs = {**mine, "loader_workers": settings.loader_workers, "device": device}
    status, message = "finished", None
    with _appearance(task.stop) if rank == 0 else nullcontext(lambda: False) as stop:
        try:
            loop.fit(
                training,
                recipe_,
                train_batches=lambda epoch, start_step: data.train_batches(
                    images["train"], recipe_, experiment.data, seed=seed, epoch=epoch, start_step=start_step,
                    batch_size=batch_size, **theirs,
                ),
                val_batches=lambda: data.val_batches(
                    images["val"], recipe_, experiment.data, batch_size=batch_size, **theirs,
                ),
                on_step=after_step,
                on_epoch=after_epoch,
                stop=stop,
                num_classes=num_classes,
                seed=seed,
                names=images["train"].keys,
                amp=amp,
                forward=forward,
                no_sync=no_sync,
                all_reduce=_all_reduce if world_size > 1 else lambda sums: sums,
                **mine,
            )
        except loop.NonFiniteLoss as error:
            status, message = "diverged", str(error)
        except loop.Stopped:
            status = "stopped"
            save(training)
    checkpoints.wait()
    return {
        "status": status,
        "message": message,
        "history": training.history,
        "best_epoch": {name: best.epoch for name, best in training.best.items()},
    }


def _batch_size(
    experiment: Experiment, recipe_: Recipe, model: torch.nn.Module, amp: str, num_classes: int, world_size: int
) -> int:
    """Images of one forward pass; a larger share of the global batch takes several of them."""
    wanted = experiment.train.batch_per_worker
    share = -(-recipe_.global_batch_size // recipe_.mixup_group // world_size) * recipe_.mixup_group
    if wanted != "auto":
        return min(wanted, share)
    if next(model.parameters()).device.type != "cuda":
        return share
    sizes = memory.batch_sizes(share, recipe_.mixup_group)
    found = memory.largest_batch(model, recipe_, sizes, image_size=experiment.data.image_size,
                                 num_classes=num_classes, amp=amp)
    everywhere = torch.tensor(found, device=get_device())
    if world_size > 1:
        torch.distributed.all_reduce(everywhere, op=torch.distributed.ReduceOp.MIN)
    return int(everywhere)


def _forward(
    model: torch.nn.Module, device: torch.device, *, compile: bool, world_size: int
) -> tuple[Callable[[torch.Tensor], torch.Tensor], Callable[[], AbstractContextManager]]:
    """The model as training calls it, under DDP when there are several workers, and DDP's `no_sync`."""
    no_sync: Callable[[], AbstractContextManager] = nullcontext
    if world_size > 1:
        # Told to look for unused parameters, DDP keeps its first order of reduction. Else it makes another after the
        # first step, so that a resumed run would add up gradients in another order than one that was not interrupted.
        model = prepare_model(
            model, move_to_device=False, parallel_strategy_kwargs={"find_unused_parameters": True}
        )
        assert isinstance(model, DistributedDataParallel)
        no_sync = model.no_sync
    if compile:
        from flopeq.benchmark import can_compile

        return (torch.compile(model) if can_compile(device) else model), no_sync
    return model, no_sync


def _from_rank_0(value: Any, world_size: int) -> Any:
    """Rank 0's value, on every rank."""
    values = [value]
    if world_size > 1:
        torch.distributed.broadcast_object_list(values, src=0)
    return values[0]


def _all_reduce(sums: torch.Tensor) -> torch.Tensor:
    torch.distributed.all_reduce(sums)
    return sums


@contextmanager
def _appearance(place: str) -> Iterator[Callable[[], bool]]:
    """Whether a file has appeared, as a thread sees it that looks once a second."""
    appeared, ended = threading.Event(), threading.Event()
    files, path = open_place(place)

    def look() -> None:
        while not ended.wait(_POLL_S):
            with suppress(OSError):  # of a storage that does not answer now and then
                if files.get_file_info(path).type != FileType.NotFound:
                    appeared.set()
                    return

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield appeared.is_set
    finally:
        ended.set()
        thread.join()
