"""A step never waits for the device: nothing is read from it, and nothing is copied to it from ordinary memory.

Without a GPU, steps run on the meta device, which computes nothing. `DeviceReads` sees each read and copy there. On a
GPU, torch itself raises at each call that waits (`torch.cuda.set_sync_debug_mode`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from timm.layers import DropPath
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.base.config import load_experiment
from pipeline.base.schema import Recipe
from pipeline.loading import augment, batching
from pipeline.training import device_time, loop

CLASSES, PER_EPOCH, BATCH, SIDE = 4, 5, 8, 16


class DeviceReads(TorchDispatchMode):
    """Notes what would wait for a device, here the meta device: reads, and blocking copies from or to it."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = function.name().removeprefix("aten::").partition(".")[0]
        devices = {tensor.device.type for tensor in args if isinstance(tensor, Tensor)}
        if name == "_local_scalar_dense" and "meta" in devices:
            self.found.append("item")
            return 1.0
        if name in ("nonzero", "equal", "is_nonzero", "masked_select") and "meta" in devices:
            self.found.append(name)
        if name in ("_to_copy", "to"):  # `to` in inference mode
            given = [kwargs.get("device"), *(argument for argument in args if isinstance(argument, torch.device))]
            target = next(filter(None, given), args[0].device).type
            if {args[0].device.type, target} == {"cpu", "meta"}:
                if not kwargs.get("non_blocking"):
                    self.found.append("to")
                if target == "cpu":
                    return torch.ones(args[0].shape, dtype=args[0].dtype)
        if name == "copy_" and devices == {"cpu", "meta"} and not (args[2:] or (kwargs.get("non_blocking"),))[0]:
            self.found.append("copy_")
        return function(*args, **kwargs)


def small_recipe(**changes: Any) -> Recipe:
    settings = {"epochs": 2, "warmup_epochs": 1, "global_batch_size": BATCH, "mixup_group": 4, "mixup_alpha": 0.8}
    settings |= {"cutmix_alpha": 1.0, "random_erasing": 0.5, "clip_grad_norm": 1.0, "ema_decay": 0.9}
    return load_experiment().recipes["digits"].model_copy(update={**settings, **changes})


def network(device: str) -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Flatten(), nn.Linear(3 * SIDE * SIDE, 8), DropPath(0.5), nn.GELU(), nn.Linear(8, CLASSES)
    return nn.Sequential(*layers).to(device)


def batches(recipe: Recipe, device: str, per_epoch: int = PER_EPOCH) -> Iterator[batching.Batch]:
    """Batches as `BatchLoader` makes them from what loader processes have put into pinned memory."""
    data = load_experiment().data.model_copy(update={"image_size": SIDE})
    normalize, sample = augment.Normalize(data, device), augment.RandomErasingSampler(recipe, SIDE)
    pin = Tensor.pin_memory if device == "cuda" else lambda tensor: tensor
    decoded = []
    for step in range(per_epoch):
        pixels = torch.randint(256, (BATCH, 3, SIDE, SIDE), dtype=torch.uint8)
        labels = torch.randint(CLASSES, (BATCH,))
        patches = sample(range(step * BATCH, (step + 1) * BATCH))
        assert len(patches.boxes) > 0
        decoded.append((pin(pixels), pin(labels), augment.ErasedPatches(patches.boxes, pin(patches.values))))
    for pixels, labels, patches in decoded:
        images = augment.erase_patches(normalize(pixels), patches)
        LateCopy.num_queued += 1
        yield batching.Batch(images, labels.to(device, non_blocking=True), torch.arange(BATCH), (1, 2))


def resume(training: loop.TrainState, recipe: Recipe, device: str) -> loop.TrainState:
    """The training with the state that it has in a checkpoint, which is loaded to the CPU."""
    state = {key: value for key, value in training.state_dict().items()}
    resumed = loop.TrainState.create(network(device), recipe, steps_per_epoch=PER_EPOCH, amp=None)
    best = {name: loop.copy_weights(network("cpu")) for name in training.best}
    resumed.load_state_dict(_to_cpu(state), best)
    return resumed


def _to_cpu(state: Any) -> Any:
    if isinstance(state, Tensor):
        return torch.ones(state.shape, dtype=state.dtype) if state.is_meta else state.cpu()
    if isinstance(state, dict):
        return {key: _to_cpu(value) for key, value in state.items()}
    return [_to_cpu(value) for value in state] if isinstance(state, list) else state


@contextmanager
def no_values_on_meta(monkeypatch: pytest.MonkeyPatch) -> Iterator[DeviceReads]:
    """A device without values for what a training does outside its steps, and a note of what would wait for it."""
    reads = DeviceReads()
    from_values = torch.tensor, Tensor.new_tensor

    def note(made: Tensor) -> Tensor:
        if made.is_meta:
            reads.found.append("tensor")
        return made

    monkeypatch.setattr(torch, "tensor", lambda *args, **settings: note(from_values[0](*args, **settings)))
    monkeypatch.setattr(Tensor, "new_tensor", lambda *args, **settings: note(from_values[1](*args, **settings)))
    generator = torch.Generator
    monkeypatch.setattr(torch, "Generator", lambda device="cpu": generator())  # which timm's average has
    monkeypatch.setattr(loop, "autocast", lambda *_: nullcontext())
    monkeypatch.setattr(loop, "HostCopy", LateCopy)
    with reads:
        yield reads


class LateCopy:
    """A HostCopy that notes how many steps were queued before it was read."""

    num_queued, delays = 0, []

    def __init__(self, values: Tensor) -> None:
        assert values.is_meta
        self.number = self.num_queued

    def read(self) -> list[float]:
        self.delays.append(self.num_queued - self.number)
        return [0.5, 0.0]


@pytest.mark.filterwarnings("ignore:.*copying from a non-meta parameter")
@pytest.mark.parametrize("resumed", [False, True])
@pytest.mark.parametrize("optimizer", ["adamw", "lamb"])
def test_a_step_does_not_wait_for_the_device(optimizer, resumed, monkeypatch):
    recipe, seen = small_recipe(optimizer=optimizer, epochs=3), []
    LateCopy.num_queued, LateCopy.delays = 0, []
    with no_values_on_meta(monkeypatch) as reads:
        training = loop.TrainState.create(network("meta"), recipe, steps_per_epoch=PER_EPOCH, amp=None)

        def fit() -> None:
            loop.fit(
                training,
                recipe.model_copy(update={"epochs": training.epoch + 1}),
                train_batches=lambda epoch, start: batches(recipe, "meta"),
                val_batches=lambda: batches(recipe, "meta", per_epoch=3),
                on_step=lambda training: seen.append(list(reads.found)),
                on_epoch=lambda training: None,
                num_classes=CLASSES,
                seed=0,
            )

        fit()
        if resumed:
            training = resume(training, recipe, "meta")
            seen.clear()
            fit()
    assert len(seen) == PER_EPOCH
    assert seen[-1][len(seen[0]) :] == []
    assert LateCopy.delays == [*[1] * (PER_EPOCH - 1), 0] * training.epoch  # at the end of an epoch, at once


@pytest.mark.parametrize("num_models", [1, 2])
def test_validation_waits_once(num_models, monkeypatch):
    recipe = small_recipe()
    models = {f"{number}": network("meta") for number in range(num_models)}
    with no_values_on_meta(monkeypatch) as reads:
        found = []
        for per_epoch in (2, 20):
            reads.found.clear()
            loop.evaluate_models(models, batches(recipe, "meta", per_epoch))
            found.append(list(reads.found))
    assert found[0] == found[1] and found[0].count("to") == 1


def test_the_counter_sees_what_waits(monkeypatch):
    with no_values_on_meta(monkeypatch) as reads:
        images = torch.empty(3, device="meta")
        images.sum().item()
        images.cpu()
        images[:2] = torch.ones(2)
        images.new_tensor(1.0)
        torch.ones(3).to("meta")
        torch.ones(3).to("meta", non_blocking=True)
        assert reads.found == ["item", "to", "copy_", "tensor", "to"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("amp", [None, "bf16"])
@pytest.mark.parametrize("optimizer", ["adamw", "lamb"])
def test_a_step_on_a_gpu_does_not_wait_for_it(optimizer, amp):
    """fp16 is left out: torch's GradScaler reads whether the gradients are finite at every step."""
    recipe, device = small_recipe(optimizer=optimizer, epochs=3), "cuda"
    training = loop.TrainState.create(network(device), recipe, steps_per_epoch=PER_EPOCH, amp=amp)

    def fit(on_step: Any) -> None:
        loop.fit(
            training,
            recipe.model_copy(update={"epochs": training.epoch + 1}),
            train_batches=lambda epoch, start: batches(recipe, device),
            val_batches=lambda: batches(recipe, device, per_epoch=3),
            on_step=on_step,
            on_epoch=lambda training: None,
            num_classes=CLASSES,
            seed=0,
            amp=amp,
        )

    fit(lambda training: None)
    training = resume(training, recipe, device)
    steps = []

    def watch(training: loop.TrainState) -> None:
        steps.append(training.step)
        watched = len(steps) in range(2, PER_EPOCH)  # the epoch's end reads its loss
        torch.cuda.set_sync_debug_mode("error" if watched else "default")

    try:
        fit(watch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(steps) == PER_EPOCH


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_host_copy_does_not_wait_for_later_work():
    values, matrix = torch.tensor([1.0, 2.0], device="cuda"), torch.randn(8192, 8192, device="cuda")
    copied, done = device_time.HostCopy(values), torch.cuda.Event()
    for _ in range(50):
        matrix = matrix @ matrix
    done.record()
    assert copied.read() == [1.0, 2.0] and not done.query()
