"""The training loop of one worker: no Ray, no MLflow, no files.

An epoch is a pure function of the state before it: order and augmentation come from (seed, epoch) with the
batches, and dropout's generator is seeded anew from (seed, epoch, rank). A checkpoint therefore needs no
generator state, and a run that goes on from one ends with the weights of a run that was never interrupted.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from timm.utils.clip_grad import dispatch_clip_grad
from torch import Tensor, nn

from pipeline import augment
from pipeline import recipe as recipes
from pipeline.config import Recipe
from pipeline.data import Batch

AMP_DTYPES = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}
AllReduce = Callable[[Tensor], Tensor]
"""Sum of a tensor over the workers."""


class Metrics(NamedTuple):
    """Cross-entropy and accuracy over a whole split, all workers together."""

    loss: float
    top1_pct: float
    top5_pct: float


class NonFiniteLoss(ArithmeticError):
    """The loss is infinite or not a number: the run has diverged. Says at which step, lr and images."""

    def __init__(self, loss: float, *, epoch: int, step: int, lr: float, ids: Any) -> None:
        super().__init__(
            f"loss {loss} in epoch {epoch} at step {step}, lr {lr:.3g}; images of this worker's batch: {ids}"
        )


@dataclass
class Best:
    """The best epoch so far by validation top-1; epoch -1: the initial weights."""

    epoch: int
    top1_pct: float
    weights: dict[str, Tensor]


@dataclass
class Training:
    """A training between two epochs: everything that a checkpoint holds."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: Any
    scaler: torch.amp.GradScaler
    ema: Any
    best: Best
    steps_per_epoch: int
    epoch: int = 0
    history: list[dict[str, float]] = field(default_factory=list)

    @classmethod
    def start(cls, model: nn.Module, recipe: Recipe, *, steps_per_epoch: int, amp: str) -> Training:
        """The state before the first epoch. The model must already be on its device."""
        optimizer = recipes.optimizer(recipe, model)
        device = next(model.parameters()).device.type
        return cls(
            model,
            optimizer,
            recipes.scheduler(recipe, optimizer, steps_per_epoch),
            torch.amp.GradScaler(device, enabled=amp == "fp16"),
            recipes.ema(recipe, model),
            Best(-1, -math.inf, weights_of(model)),
            steps_per_epoch,
        )

    @property
    def judged(self) -> nn.Module:
        """The model that is validated and kept: the moving average where there is one."""
        return self.model if self.ema is None else self.ema.module

    def state_dict(self) -> dict[str, Any]:
        """Tensors, numbers, strings, lists and dicts only, as `torch.load(weights_only=True)` wants."""
        return {
            "epoch": self.epoch,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
            "ema": None if self.ema is None else self.ema.module.state_dict(),
            "history": self.history,
            "best": {"epoch": self.best.epoch, "top1_pct": self.best.top1_pct},
        }

    def load_state_dict(self, state: dict[str, Any], best_weights: dict[str, Tensor]) -> None:
        """Takes up a training where `state_dict` left it."""
        self.epoch = state["epoch"]
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.scaler.load_state_dict(state["scaler"])
        if self.ema is not None:
            self.ema.module.load_state_dict(state["ema"])
        self.history = state["history"]
        self.best = Best(weights=best_weights, **state["best"])


def fit(
    training: Training,
    recipe: Recipe,
    *,
    train_batches: Callable[[int], Iterable[Batch]],
    val_batches: Callable[[], Iterable[Batch]],
    on_epoch: Callable[[Training], None],
    num_classes: int,
    seed: int,
    names: Callable[[Tensor], list[Any]] = Tensor.tolist,
    amp: str = "off",
    forward: Callable[[Tensor], Tensor] | None = None,
    rank: int = 0,
    world_size: int = 1,
    all_reduce: AllReduce = lambda sums: sums,
) -> None:
    """Trains from `training.epoch` to the recipe's last epoch; `on_epoch` sees the state after each.

    Args:
        train_batches: this worker's slices of an epoch's global batches, on the model's device.
        val_batches: this worker's part of the validation images, there too.
        names: what to call the images of `Batch.rows` when they make the loss infinite.
        amp: a key of AMP_DTYPES.
        forward: the model as it is to be called (compiled, wrapped in DDP); None: the model itself.
    Raises: NonFiniteLoss, on every worker at the same step, at the latest one step after it happened.
    """
    device = next(training.model.parameters()).device
    loss_fn = recipes.loss(recipe)
    mix = augment.batch_transform(recipe, num_classes)
    forward = training.model if forward is None else forward
    for epoch in range(training.epoch, recipe.epochs):
        torch.manual_seed(augment.fold(seed, epoch, rank))
        training.model.train()
        training.scheduler.step(epoch)
        started, images, losses, pending = time.perf_counter(), 0, [], None
        for number, batch in enumerate(train_batches(epoch)):
            step = epoch * training.steps_per_epoch + number
            training.scheduler.step_update(step)
            inputs, targets = mix(batch.images, batch.labels, batch.seed)
            with autocast(device, amp):
                loss = loss_fn(forward(inputs), targets)
            _update(training, recipe, loss, step)
            mean = all_reduce(loss.detach().clone()) / world_size
            _check(pending, names)  # of the step before: reading this one's would wait for the device
            pending = (mean, epoch, step, training.optimizer.param_groups[0]["lr"], batch.rows)
            losses.append(mean)
            images += len(inputs) * world_size
        _check(pending, names)
        train_loss = torch.stack(losses).mean().item()
        seconds = time.perf_counter() - started
        val = evaluate(training.judged, val_batches(), amp=amp, all_reduce=all_reduce)
        training.epoch = epoch + 1
        training.history.append({
            "epoch": epoch,
            "lr": training.optimizer.param_groups[0]["lr"],
            "train/loss": train_loss,
            "val/loss": val.loss,
            "val/top1_pct": val.top1_pct,
            "val/top5_pct": val.top5_pct,
            "perf/img_per_s": images / seconds,
        })
        if val.top1_pct > training.best.top1_pct:
            training.best = Best(epoch, val.top1_pct, weights_of(training.judged))
        on_epoch(training)


def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    amp: str = "off",
    all_reduce: AllReduce = lambda sums: sums,
) -> Metrics:
    """Cross-entropy, top-1 and top-5 of a model over labelled batches, all workers together."""
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
    return Metrics(loss / images, 100 * top1 / images, 100 * top5 / images)


def autocast(device: torch.device, amp: str) -> torch.autocast:
    """The forward pass's precision: a key of AMP_DTYPES."""
    return torch.autocast(device.type, AMP_DTYPES[amp], enabled=amp != "off")


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """A copy of a model's weights on the CPU."""
    return {name: weight.detach().cpu().clone() for name, weight in model.state_dict().items()}


def _update(training: Training, recipe: Recipe, loss: Tensor, step: int) -> None:
    """One optimizer step down the gradient of the loss."""
    training.optimizer.zero_grad(set_to_none=True)
    training.scaler.scale(loss).backward()
    if recipe.clip_grad_norm is not None:
        training.scaler.unscale_(training.optimizer)
        dispatch_clip_grad(training.model.parameters(), recipe.clip_grad_norm)
    training.scaler.step(training.optimizer)
    training.scaler.update()
    if training.ema is not None:
        training.ema.update(training.model, step + 1)


def _check(pending: tuple[Tensor, int, int, float, Tensor] | None, names: Callable[[Tensor], list[Any]]) -> None:
    if pending is not None and not math.isfinite(loss := pending[0].item()):
        _, epoch, step, lr, rows = pending
        raise NonFiniteLoss(loss, epoch=epoch, step=step, lr=lr, ids=names(rows))
