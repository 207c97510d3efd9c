"""The training loop of one worker: no Ray, no MLflow, no files.

A step is a pure function of the state before it: order and augmentation come with the batches, and the model's random
operations are reseeded from (seed, step, rank) at each step. A checkpoint therefore needs no generator state. A run
resumed from a checkpoint, even in the middle of an epoch, ends with the same weights as an uninterrupted run.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.base.schema import Recipe
from pipeline.loading import augment
from pipeline.loading.batching import Batch
from pipeline.training import recipe as recipes
from pipeline.training.device_time import DataWait, HostCopy

if TYPE_CHECKING:
    from pipeline.training.step_log import StepLog

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
            "losses": torch.stack(self.losses).tolist() if self.losses else [],
            "history": self.history,
            "best": {name: {"epoch": best.epoch, "top1_pct": best.top1_pct} for name, best in self.best.items()},
        }

    def load_state_dict(self, state: dict[str, Any], best_weights: dict[str, dict[str, Tensor]]) -> None:
        """Restores a `state_dict` on the CPU. The best weights are stored separately, because they rarely change."""
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
    step_log: StepLog | None = None,
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
        step_log: gets numbers of single steps of this worker.
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
        losses, rows, wait = [], [], DataWait(device)
        for batch in wait.measure(train_batches(epoch, len(training.losses))):
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
            grad_norm = _optimizer_step(training, recipe, step, with_norm=step_log is not None and step_log.is_due())
            mean = torch.stack(losses).sum()
            # `new_full` fills on the device, where `new_tensor` would copy and wait.
            reduced = all_reduce(torch.stack([mean, mean.new_full((), float(should_stop()))])) / world_size
            # The previous step's: reading this one's loss would wait for the device.
            stop_requested = _check_previous_step(previous_step, image_names, step_log)
            values = reduced if grad_norm is None else torch.cat([reduced, grad_norm.to(reduced).view(1)])
            lr = training.optimizer.param_groups[0]["lr"]
            previous_step = _QueuedStep(HostCopy(values), epoch, step, lr, torch.cat(rows), wait, training.scaler)
            training.losses.append(reduced[0])
            images += recipe.global_batch_size
            losses, rows = [], []
            on_step(training)
            if stop_requested:
                raise TrainingStopped
        if _check_previous_step(previous_step, image_names, step_log):
            raise TrainingStopped
        train_loss = torch.stack(training.losses).mean().item()
        seconds = time.perf_counter() - started
        row = {"epoch": epoch, "lr": training.optimizer.param_groups[0]["lr"], "train/loss": train_loss}
        wait_s = wait.largest_s(all_reduce, rank, world_size)
        row |= {"perf/img_per_s": images / seconds, "perf/data_wait_pct": 100 * wait_s / seconds}
        models = training.evaluated_models
        for name, val in evaluate_models(models, val_batches(), amp=amp, all_reduce=all_reduce).items():
            prefix = "val/" if name == WEIGHTS else f"val/{name}_"
            row |= {f"{prefix}{metric}": value for metric, value in val._asdict().items()}
            if val.top1_pct > training.best[name].top1_pct:
                training.best[name] = BestWeights(epoch, val.top1_pct, copy_weights(models[name]))
        training.history.append(row)
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
    return evaluate_models({WEIGHTS: model}, batches, amp=amp, all_reduce=all_reduce)[WEIGHTS]


def evaluate_models(
    models: Mapping[str, nn.Module],
    batches: Iterable[Batch],
    *,
    amp: str | None = None,
    all_reduce: AllReduce = lambda sums: sums,
) -> dict[str, EvalMetrics]:
    """Evaluates several models in one pass over labelled batches, and waits for the device only at the end."""
    device = next(next(iter(models.values())).parameters()).device
    num_images, sums = 0, torch.zeros(len(models), 3, dtype=torch.float64, device=device)  # loss, top-1, top-5
    with torch.inference_mode():
        for model in models.values():
            model.eval()
        for batch in batches:
            num_images += len(batch.labels)
            for model, own_sums in zip(models.values(), sums, strict=True):
                with autocast(device, amp):
                    logits = model(batch.images)
                hits = logits.topk(min(5, logits.shape[1])).indices == batch.labels[:, None]
                loss = F.cross_entropy(logits.double(), batch.labels, reduction="sum")
                own_sums += torch.stack([loss, hits[:, 0].sum(), hits.sum()])
        *totals, num_images = all_reduce(torch.cat([sums.flatten(), sums.new_full((1,), num_images)])).tolist()
    if num_images == 0:
        raise ValueError("no images to evaluate on")
    metrics = {}
    for number, name in enumerate(models):
        loss, top1, top5 = totals[3 * number : 3 * number + 3]
        metrics[name] = EvalMetrics(loss / num_images, 100 * top1 / num_images, 100 * top5 / num_images)
    return metrics


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


class _QueuedStep(NamedTuple):
    """A step whose kernels are queued. Its values are read when those of the next step are queued, too."""

    values: HostCopy
    """Loss, whether a worker asks to stop, and the norm of the gradient if the step is logged."""
    epoch: int
    step: int
    lr: float
    rows: Tensor
    wait: DataWait
    scaler: torch.amp.GradScaler


def _optimizer_step(training: TrainState, recipe: Recipe, step: int, *, with_norm: bool) -> Tensor | None:
    """Clips the gradient, runs an optimizer step and updates the moving average.

    Returns the norm of the gradient before it is clipped, if it is wanted.
    """
    grad_norm = None
    if recipe.clip_grad_norm is not None or with_norm:
        training.scaler.unscale_(training.optimizer)
    if recipe.clip_grad_norm is not None:
        grad_norm = nn.utils.clip_grad_norm_(training.model.parameters(), recipe.clip_grad_norm)
    elif with_norm:
        gradients = [weight.grad for weight in training.model.parameters() if weight.grad is not None]
        grad_norm = nn.utils.get_total_norm(gradients)
    training.scaler.step(training.optimizer)
    training.scaler.update()
    if training.ema is not None:
        training.ema.update(training.model, step + 1)
    return grad_norm if with_norm else None


def _check_previous_step(
    previous: _QueuedStep | None, image_names: Callable[[Tensor], list[Any]], step_log: StepLog | None
) -> bool:
    """Whether a worker asked to stop at that step. Raises: NonFiniteLossError if its loss was not finite."""
    if previous is None:
        return False
    loss, stop, *norm = previous.values.read()
    if not math.isfinite(loss):
        names = image_names(previous.rows)
        raise NonFiniteLossError(loss, epoch=previous.epoch, step=previous.step, lr=previous.lr, ids=names)
    if step_log is not None and norm:
        scale = previous.scaler.get_scale() if previous.scaler.is_enabled() else None
        step_log.add(previous.step, loss=loss, grad_norm=norm[0], wait_s=previous.wait.seconds, loss_scale=scale)
    return stop > 0
