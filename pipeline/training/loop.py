"""The training loop of one worker: no Ray, no MLflow, no files.

A step is a pure function of the state before it: order and augmentation come with the batches, and the model's random
operations are reseeded from (seed, step, rank) at each step. A checkpoint therefore needs no generator state. A run
resumed from a checkpoint, even in the middle of an epoch, ends with the same weights as an uninterrupted run.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from timm.utils.clip_grad import dispatch_clip_grad
from torch import Tensor, nn

from pipeline.base.schema import Recipe
from pipeline.loading import augment
from pipeline.loading.batching import Batch
from pipeline.training import recipe as recipes

WEIGHTS, EMA_WEIGHTS = "plain", "ema"
"""Names of the weights and of their moving average."""

AMP_DTYPES = {None: None, "bf16": torch.bfloat16, "fp16": torch.float16}

AllReduce = Callable[[Tensor], Tensor]
"""Sums a tensor over the workers."""


class EvalMetrics(NamedTuple):
    """Cross-entropy and accuracy over a whole split, summed over all workers."""

    loss: float
    top1_pct: float
    top5_pct: float


class NonFiniteLossError(ArithmeticError):
    """The loss is infinite or NaN: the run has diverged. The message has the step, the lr and the images."""

    def __init__(self, loss: float, *, epoch: int, step: int, lr: float, ids: Any) -> None:
        super().__init__(
            f"loss {loss} in epoch {epoch} at step {step}, lr {lr:.3g}; images of this worker's batch: {ids}"
        )


class TrainingStopped(Exception):
    """The training was stopped on request before its last epoch, between two steps."""


@dataclass
class BestWeights:
    """The best epoch so far by validation top-1, and its weights. Epoch -1 stands for the initial weights."""

    epoch: int
    top1_pct: float
    weights: dict[str, Tensor]


@dataclass
class TrainState:
    """The state of a training between two steps: everything that a checkpoint holds."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: Any
    scaler: torch.amp.GradScaler
    ema: Any
    best: dict[str, BestWeights]
    """One for each of `evaluated_models`."""
    steps_per_epoch: int
    epoch: int = 0
    losses: list[Tensor] = field(default_factory=list)
    """Losses of the completed steps of this epoch."""
    history: list[dict[str, float]] = field(default_factory=list)
    """One row per completed epoch."""

    @classmethod
    def create(
        cls,
        model: nn.Module,
        recipe: Recipe,
        *,
        steps_per_epoch: int,
        amp: str | None,
        warmup_steps: int | None = None,
    ) -> TrainState:
        """Creates the state before the first epoch. The model must already be on its device.

        Args:
            warmup_steps: as for `recipe.build_scheduler`.
        """
        optimizer = recipes.build_optimizer(recipe, model)
        device = next(model.parameters()).device.type
        ema = recipes.build_ema(recipe, model)
        return cls(
            model,
            optimizer,
            recipes.build_scheduler(recipe, optimizer, steps_per_epoch, warmup_steps),
            torch.amp.GradScaler(device, enabled=amp == "fp16"),
            ema,
            {name: BestWeights(-1, -math.inf, copy_weights(model)) for name in evaluated_names(recipe)},
            steps_per_epoch,
        )

    @property
    def evaluated_models(self) -> dict[str, nn.Module]:
        """The models that are validated and kept: the model and, if there is one, its moving average."""
        return {WEIGHTS: self.model} | ({} if self.ema is None else {EMA_WEIGHTS: self.ema.module})

    @property
    def step(self) -> int:
        """Number of completed optimizer steps over all epochs."""
        return self.epoch * self.steps_per_epoch + len(self.losses)

    def state_dict(self) -> dict[str, Any]:
        """Holds tensors, numbers, strings, lists and dicts only, as `torch.load(weights_only=True)` requires."""
        return {
            "epoch": self.epoch,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
            "ema": None if self.ema is None else self.ema.module.state_dict(),
            "losses": [loss.item() for loss in self.losses],
            "history": self.history,
            "best": {name: {"epoch": best.epoch, "top1_pct": best.top1_pct} for name, best in self.best.items()},
        }

    def load_state_dict(self, state: dict[str, Any], best_weights: dict[str, dict[str, Tensor]]) -> None:
        """Restores a `state_dict`. The best weights are stored separately, because they rarely change."""
        self.epoch = state["epoch"]
        self.losses = list(torch.tensor(state["losses"], device=next(self.model.parameters()).device))
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.scaler.load_state_dict(state["scaler"])
        if self.ema is not None:
            self.ema.module.load_state_dict(state["ema"])
        self.history = state["history"]
        self.best = {name: BestWeights(weights=best_weights[name], **best) for name, best in state["best"].items()}


def fit(
    training: TrainState,
    recipe: Recipe,
    *,
    train_batches: Callable[[int, int], Iterable[Batch]],
    val_batches: Callable[[], Iterable[Batch]],
    on_epoch: Callable[[TrainState], None],
    on_step: Callable[[TrainState], None] = lambda training: None,
    should_stop: Callable[[], bool] = lambda: False,
    num_classes: int,
    seed: int,
    image_names: Callable[[Tensor], list[Any]] = Tensor.tolist,
    amp: str | None = None,
    forward: Callable[[Tensor], Tensor] | None = None,
    no_sync: Callable[[], AbstractContextManager] = nullcontext,
    rank: int = 0,
    world_size: int = 1,
    all_reduce: AllReduce = lambda sums: sums,
) -> None:
    """Trains from the state `training` to the recipe's last epoch.

    Args:
        train_batches: (epoch, start step) -> this worker's slices of the global batches, each in one or several parts,
            on the model's device. Slices of different workers may differ in size: each image has the same weight.
        val_batches: returns this worker's part of the validation images, on the model's device.
        on_epoch, on_step: called with the state after each epoch, and after each step within an epoch.
        should_stop: whether to stop the training; one worker that returns True stops all workers.
        image_names: names of the images of `Batch.rows`, for the error message when the loss is not finite.
        amp: a key of AMP_DTYPES.
        forward: the model as training calls it (compiled, wrapped in DDP); None: the model itself.
        no_sync: a context without gradient synchronization, for all parts of a step but the last.
    Raises, on every worker at the same step, at most one step late:
        NonFiniteLossError: the run has diverged.
        TrainingStopped: `should_stop` returned True.
    """
    device = next(training.model.parameters()).device
    loss_fn = recipes.build_loss(recipe)
    mixup = augment.build_mixup(recipe, num_classes)
    forward = training.model if forward is None else forward
    for epoch in range(training.epoch, recipe.epochs):
        training.model.train()
        training.scheduler.step(epoch)
        started, images, previous_step = time.perf_counter(), 0, None
        losses, rows = [], []
        for batch in train_batches(epoch, len(training.losses)):
            step = training.step
            if not losses:
                _seed_device(device, augment.derive_seed(seed, step, rank))
                training.scheduler.step_update(step)
                training.optimizer.zero_grad(set_to_none=True)
            inputs, targets = mixup(batch.images, batch.labels, batch.seeds)
            loss_weight = len(inputs) * world_size / recipe.global_batch_size  # DDP averages over the workers
            with nullcontext() if batch.ends_step else no_sync():
                with autocast(device, amp):
                    loss = loss_fn(forward(inputs), targets) * loss_weight
                training.scaler.scale(loss).backward()
            losses.append(loss.detach())
            rows.append(batch.rows)
            if not batch.ends_step:
                continue
            _optimizer_step(training, recipe, step)
            mean = torch.stack(losses).sum()
            reduced = all_reduce(torch.stack([mean, mean.new_tensor(float(should_stop()))])) / world_size
            # The previous step's: reading this one's loss would wait for the device.
            stop_requested = _check_previous_step(previous_step, image_names)
            previous_step = (reduced, epoch, step, training.optimizer.param_groups[0]["lr"], torch.cat(rows))
            training.losses.append(reduced[0])
            images += recipe.global_batch_size
            losses, rows = [], []
            on_step(training)
            if stop_requested:
                raise TrainingStopped
        if _check_previous_step(previous_step, image_names):
            raise TrainingStopped
        train_loss = torch.stack(training.losses).mean().item()
        seconds = time.perf_counter() - started
        row = {"epoch": epoch, "lr": training.optimizer.param_groups[0]["lr"], "train/loss": train_loss}
        for name, model in training.evaluated_models.items():
            val = evaluate(model, val_batches(), amp=amp, all_reduce=all_reduce)
            prefix = "val/" if name == WEIGHTS else f"val/{name}_"
            row |= {f"{prefix}{metric}": value for metric, value in val._asdict().items()}
            if val.top1_pct > training.best[name].top1_pct:
                training.best[name] = BestWeights(epoch, val.top1_pct, copy_weights(model))
        training.history.append(row | {"perf/img_per_s": images / seconds})
        training.epoch, training.losses = epoch + 1, []
        on_epoch(training)


def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    amp: str | None = None,
    all_reduce: AllReduce = lambda sums: sums,
) -> EvalMetrics:
    """Returns cross-entropy, top-1 and top-5 of a model over labelled batches, summed over all workers."""
    device = next(model.parameters()).device
    model.eval()
    sums = torch.zeros(4, dtype=torch.float64, device=device)  # loss, top-1, top-5, images
    with torch.inference_mode():
        for batch in batches:
            with autocast(device, amp):
                logits = model(batch.images)
            hits = logits.topk(min(5, logits.shape[1])).indices == batch.labels[:, None]
            loss = F.cross_entropy(logits.double(), batch.labels, reduction="sum")
            sums += torch.stack([loss, hits[:, 0].sum(), hits.sum(), torch.tensor(len(hits), device=device)])
    loss, top1, top5, images = all_reduce(sums).tolist()
    if images == 0:
        raise ValueError("no images to evaluate on")
    return EvalMetrics(loss / images, 100 * top1 / images, 100 * top5 / images)


def autocast(device: torch.device, amp: str | None) -> torch.autocast:
    """Returns the autocast context of the forward pass. `amp` is a key of AMP_DTYPES."""
    return torch.autocast(device.type, AMP_DTYPES[amp], enabled=amp is not None)


def copy_weights(model: nn.Module) -> dict[str, Tensor]:
    """Returns a copy of a model's weights on the CPU."""
    return {name: weight.detach().cpu().clone() for name, weight in model.state_dict().items()}


def evaluated_names(recipe: Recipe) -> tuple[str, ...]:
    """Names of the weights that a training with this recipe validates and keeps."""
    return (WEIGHTS,) if recipe.ema_decay is None else (WEIGHTS, EMA_WEIGHTS)


def _seed_device(device: torch.device, seed: int) -> None:
    """Seeds the generators of a model on this device (torch.manual_seed also queries accelerators: 155 us)."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


def _optimizer_step(training: TrainState, recipe: Recipe, step: int) -> None:
    """Clips the gradient, runs an optimizer step and updates the moving average."""
    if recipe.clip_grad_norm is not None:
        training.scaler.unscale_(training.optimizer)
        dispatch_clip_grad(training.model.parameters(), recipe.clip_grad_norm)
    training.scaler.step(training.optimizer)
    training.scaler.update()
    if training.ema is not None:
        training.ema.update(training.model, step + 1)


def _check_previous_step(
    previous_step: tuple[Tensor, int, int, float, Tensor] | None, image_names: Callable[[Tensor], list[Any]]
) -> bool:
    """Whether a worker asked to stop at that step. Raises: NonFiniteLossError if its loss was not finite."""
    if previous_step is None:
        return False
    reduced, epoch, step, lr, rows = previous_step
    loss, stop = reduced.tolist()
    if not math.isfinite(loss):
        raise NonFiniteLossError(loss, epoch=epoch, step=step, lr=lr, ids=image_names(rows))
    return stop > 0
