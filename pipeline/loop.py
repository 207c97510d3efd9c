"""The training loop of one worker: no Ray, no MLflow, no files.

A step is a pure function of the state before it: order and augmentation come with the batches, and what is random in
the model is seeded anew from (seed, step, rank). A checkpoint therefore needs no generator state, and a run that goes
on from one, in the middle of an epoch too, ends with the weights of a run that was never interrupted.
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

from pipeline import augment
from pipeline import recipe as recipes
from pipeline.config import Recipe
from pipeline.data import Batch

PLAIN, EMA = "plain", "ema"
"""Names of the weights themselves, and of their moving average."""
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


class Stopped(Exception):
    """The training was asked to end before its last epoch; its state is that between two steps."""


@dataclass
class Best:
    """The best epoch so far by validation top-1, and its weights; epoch -1: the initial ones."""

    epoch: int
    top1_pct: float
    weights: dict[str, Tensor]


@dataclass
class Training:
    """A training between two steps: everything that a checkpoint holds."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: Any
    scaler: torch.amp.GradScaler
    ema: Any
    best: dict[str, Best]
    """Of each of `judged`."""
    steps_per_epoch: int
    epoch: int = 0
    losses: list[Tensor] = field(default_factory=list)
    """Of the steps of this epoch that are done."""
    history: list[dict[str, float]] = field(default_factory=list)
    """A row for each epoch that is done."""

    @classmethod
    def start(cls, model: nn.Module, recipe: Recipe, *, steps_per_epoch: int, amp: str) -> Training:
        """The state before the first epoch. The model must already be on its device."""
        optimizer = recipes.optimizer(recipe, model)
        device = next(model.parameters()).device.type
        ema = recipes.ema(recipe, model)
        return cls(
            model,
            optimizer,
            recipes.scheduler(recipe, optimizer, steps_per_epoch),
            torch.amp.GradScaler(device, enabled=amp == "fp16"),
            ema,
            {name: Best(-1, -math.inf, weights_of(model)) for name in judged(recipe)},
            steps_per_epoch,
        )

    @property
    def judged(self) -> dict[str, nn.Module]:
        """What is validated and kept: the model, and its moving average where there is one."""
        return {PLAIN: self.model} | ({} if self.ema is None else {EMA: self.ema.module})

    @property
    def step(self) -> int:
        """Optimizer steps that are done, over all epochs."""
        return self.epoch * self.steps_per_epoch + len(self.losses)

    def state_dict(self) -> dict[str, Any]:
        """Tensors, numbers, strings, lists and dicts only, as `torch.load(weights_only=True)` wants."""
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
        """Takes up a training where `state_dict` left it; the best weights are kept apart, as they rarely change."""
        self.epoch = state["epoch"]
        self.losses = list(torch.tensor(state["losses"], device=next(self.model.parameters()).device))
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.scaler.load_state_dict(state["scaler"])
        if self.ema is not None:
            self.ema.module.load_state_dict(state["ema"])
        self.history = state["history"]
        self.best = {name: Best(weights=best_weights[name], **best) for name, best in state["best"].items()}


def fit(
    training: Training,
    recipe: Recipe,
    *,
    train_batches: Callable[[int, int], Iterable[Batch]],
    val_batches: Callable[[], Iterable[Batch]],
    on_epoch: Callable[[Training], None],
    on_step: Callable[[Training], None] = lambda training: None,
    stop: Callable[[], bool] = lambda: False,
    num_classes: int,
    seed: int,
    names: Callable[[Tensor], list[Any]] = Tensor.tolist,
    amp: str = "off",
    forward: Callable[[Tensor], Tensor] | None = None,
    no_sync: Callable[[], AbstractContextManager] = nullcontext,
    rank: int = 0,
    world_size: int = 1,
    all_reduce: AllReduce = lambda sums: sums,
) -> None:
    """Trains from where `training` stands to the recipe's last epoch.

    Args:
        train_batches: of an epoch, from a step of it on: this worker's slices of its global batches, each in one part
            or several, on the model's device. Workers' slices may differ in size: each image counts alike.
        val_batches: this worker's part of the validation images, there too.
        on_epoch, on_step: see the state after each epoch, and after each step within one.
        stop: whether the training shall end; one worker that says so ends it for all.
        names: what to call the images of `Batch.rows` when they make the loss infinite.
        amp: a key of AMP_DTYPES.
        forward: the model as it is to be called (compiled, wrapped in DDP); None: the model itself.
        no_sync: a context in which gradients stay on their worker, for all parts but a step's last.
    Raises, on every worker at the same step, at the latest one step after it happened:
        NonFiniteLoss: the run has diverged.
        Stopped: `stop` said so.
    """
    device = next(training.model.parameters()).device
    loss_fn = recipes.loss(recipe)
    mix = augment.batch_transform(recipe, num_classes)
    forward = training.model if forward is None else forward
    for epoch in range(training.epoch, recipe.epochs):
        training.model.train()
        training.scheduler.step(epoch)
        started, images, pending = time.perf_counter(), 0, None
        losses, rows = [], []
        for batch in train_batches(epoch, len(training.losses)):
            step = training.step
            if not losses:
                _seed(device, augment.fold(seed, step, rank))
                training.scheduler.step_update(step)
                training.optimizer.zero_grad(set_to_none=True)
            inputs, targets = mix(batch.images, batch.labels, batch.seeds)
            weight = len(inputs) * world_size / recipe.global_batch_size  # DDP takes the mean over the workers
            with nullcontext() if batch.ends_step else no_sync():
                with autocast(device, amp):
                    loss = loss_fn(forward(inputs), targets) * weight
                training.scaler.scale(loss).backward()
            losses.append(loss.detach())
            rows.append(batch.rows)
            if not batch.ends_step:
                continue
            _update(training, recipe, step)
            mean = torch.stack(losses).sum()
            told = all_reduce(torch.stack([mean, mean.new_tensor(float(stop()))])) / world_size
            stopping = _check(pending, names)  # of the step before: reading this one's would wait for the device
            pending = (told, epoch, step, training.optimizer.param_groups[0]["lr"], torch.cat(rows))
            training.losses.append(told[0])
            images += recipe.global_batch_size
            losses, rows = [], []
            on_step(training)
            if stopping:
                raise Stopped
        if _check(pending, names):
            raise Stopped
        train_loss = torch.stack(training.losses).mean().item()
        seconds = time.perf_counter() - started
        row = {"epoch": epoch, "lr": training.optimizer.param_groups[0]["lr"], "train/loss": train_loss}
        for name, model in training.judged.items():
            val = evaluate(model, val_batches(), amp=amp, all_reduce=all_reduce)
            prefix = "val/" if name == PLAIN else f"val/{name}_"
            row |= {f"{prefix}{metric}": value for metric, value in val._asdict().items()}
            if val.top1_pct > training.best[name].top1_pct:
                training.best[name] = Best(epoch, val.top1_pct, weights_of(model))
        training.history.append(row | {"perf/img_per_s": images / seconds})
        training.epoch, training.losses = epoch + 1, []
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


def judged(recipe: Recipe) -> tuple[str, ...]:
    """Names of what a training with that recipe validates and keeps."""
    return (PLAIN,) if recipe.ema_decay is None else (PLAIN, EMA)


def _seed(device: torch.device, seed: int) -> None:
    """Sets the generators that a model on that device draws from (torch.manual_seed looks for accelerators: 155 us)."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


def _update(training: Training, recipe: Recipe, step: int) -> None:
    """One optimizer step down the gradient."""
    if recipe.clip_grad_norm is not None:
        training.scaler.unscale_(training.optimizer)
        dispatch_clip_grad(training.model.parameters(), recipe.clip_grad_norm)
    training.scaler.step(training.optimizer)
    training.scaler.update()
    if training.ema is not None:
        training.ema.update(training.model, step + 1)


def _check(pending: tuple[Tensor, int, int, float, Tensor] | None, names: Callable[[Tensor], list[Any]]) -> bool:
    """Whether a worker asked to stop at that step. Raises: NonFiniteLoss if its loss was not finite."""
    if pending is None:
        return False
    told, epoch, step, lr, rows = pending
    loss, stop = told.tolist()
    if not math.isfinite(loss):
        raise NonFiniteLoss(loss, epoch=epoch, step=step, lr=lr, ids=names(rows))
    return stop > 0
