"""Throughput and peak memory, by the paper's protocol (Bökman et al. 2025, appendix B).

The paper: one A100-40GB, batch 64, `torch.compile(mode="max-autotune")`, mixed precision, no gradients, 10
warm-up and 100 timed passes. Here several models take turns, pass by pass, so that whatever slows the machine
down for a while slows them all; compare them by `gain`, the median of the ratios of neighbouring passes.
A pass is a forward pass or, on request, a training step: forward, backward, optimizer.
"""

from __future__ import annotations

import gc
import logging
import os
import platform
import shutil
import statistics
import sysconfig
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

log = logging.getLogger(__name__)

MIB = 1024 * 1024

Tell = Callable[[str, int, int], object]
"""Hears which model is at work, and how many passes of all are done."""


class OutOfMemory(RuntimeError):
    """A model does not fit into the device's memory; `model` is its name."""

    def __init__(self, model: str) -> None:
        super().__init__(f"{model} does not fit into memory: take a smaller batch")
        self.model = model


@dataclass(frozen=True)
class Protocol:
    """How to measure; `PAPER` and `CPU` are the defaults of `flopeq throughput`."""

    batch_size: int
    """Images per pass."""
    warmup: int
    """Untimed passes per model, after the one that compiles."""
    runs: int
    """Timed passes per model."""
    dtype: torch.dtype
    """Autocast dtype; float32: no autocast."""
    compile: bool
    """Measure through torch.compile: `max-autotune` on a GPU, its default mode on a CPU."""
    train: bool = False
    """A pass is a training step: forward, cross-entropy, backward and AdamW, without a gradient scaler."""


PAPER = Protocol(batch_size=64, warmup=10, runs=100, dtype=torch.float16, compile=True)
CPU = Protocol(batch_size=8, warmup=2, runs=10, dtype=torch.float32, compile=True)


def protocol_for(device: torch.device | str) -> Protocol:
    """The paper's protocol on a GPU, a shorter one in float32 on a CPU."""
    return PAPER if torch.device(device).type == "cuda" else CPU


@dataclass(frozen=True)
class Throughput:
    """What was measured, and how."""

    device: str
    """`cpu`, or the GPU's name."""
    dtype: str
    batch_size: int
    compiled: bool
    seconds: tuple[float, ...]
    """Duration of each timed pass, in order."""
    peak_mem_mb: float | None
    """MiB of device memory for weights, images and activations, as the paper's "MB"; None on a CPU."""
    first_pass_s: float | None = None
    """Duration of the pass that compiles, which is short where compiled code lies in torch's cache; None: eager."""

    @property
    def runs(self) -> int:
        """Timed passes."""
        return len(self.seconds)

    @property
    def img_per_s(self) -> float:
        """Images per second of the median pass."""
        return self.batch_size / statistics.median(self.seconds)

    @property
    def img_per_s_quartiles(self) -> tuple[float, float]:
        """Images per second that a quarter and three quarters of the passes stay below."""
        first, third = quartiles(self.seconds)
        return self.batch_size / third, self.batch_size / first


def gains(of: Throughput, over: Throughput) -> list[float]:
    """How many times faster `of` was than `over`, pass by pass, measured in alternation."""
    return [slow / fast for fast, slow in zip(of.seconds, over.seconds, strict=True)]


def gain(of: Throughput, over: Throughput) -> float:
    """Median of `gains`."""
    return statistics.median(gains(of, over))


def quartiles(values: list[float] | tuple[float, ...]) -> tuple[float, float]:
    """What a quarter and three quarters of the values stay below; of a single value, itself."""
    if len(values) == 1:
        return values[0], values[0]
    first, _, third = statistics.quantiles(values, n=4, method="inclusive")
    return first, third


def can_compile(device: torch.device | str) -> bool:
    """Whether torch.compile has what it needs: a C++ compiler and Python's headers; on a GPU Triton too."""
    compilers = [os.environ.get("CXX", ""), "g++", "clang++"]
    headers = Path(sysconfig.get_paths()["include"], "Python.h")
    if not headers.is_file() or not any(shutil.which(name) for name in compilers if name):
        return False
    if torch.device(device).type == "cpu":
        return True
    from torch.utils._triton import has_triton

    return has_triton()


def device_name(device: torch.device | str) -> str:
    """`cpu`, or the GPU's name."""
    device = torch.device(device)
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def hardware_name(device: torch.device | str) -> str:
    """The GPU's name, or the processor's as Linux gives it, or else its architecture."""
    if torch.device(device).type == "cuda":
        return device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return next(iter(names), "") or platform.processor() or platform.machine()


def throughput(
    models: dict[str, nn.Module],
    *,
    image_size: tuple[int, int, int],
    batch_size: int,
    warmup: int,
    runs: int,
    dtype: torch.dtype,
    compile: bool,
    device: torch.device | str,
    train: bool = False,
    tell: Tell | None = None,
) -> dict[str, Throughput]:
    """Times passes of all models on images (C, H, W), alternating over them pass by pass.

    The models are put into evaluation mode, or for training steps into training mode, and moved to the device,
    where they stay. Raises: OutOfMemory where they do not fit there together.
    """
    device = torch.device(device)
    compiled = compile and can_compile(device)
    if compile and not compiled:
        log.warning("torch.compile needs a C++ compiler and Python's headers, not found: measuring eager")
    images_BCHW = torch.randn(batch_size, *image_size, device=device)
    done, total = 0, len(models) * (1 + warmup + runs)
    prepared: dict[str, _Prepared] = {}
    seconds: dict[str, list[float]] = {name: [] for name in models}
    name = ""
    try:
        # Models of one class share a forward method, whose cache of compilations would otherwise run out.
        with torch.set_grad_enabled(train), torch._dynamo.config.patch(cache_size_limit=8 * max(1, len(models))):
            for name, model in models.items():
                if tell:
                    tell(name, done, total)
                prepared[name] = _prepare(model, images_BCHW, dtype, compiled, train, warmup)
                done += 1 + warmup
            for _ in range(runs):
                for name, ready in prepared.items():
                    if tell:
                        tell(name, done, total)
                    seconds[name].append(timed(ready.run, device))
                    done += 1
    except Exception as error:
        if is_out_of_memory(error):
            raise OutOfMemory(name) from error
        raise
    return {
        name: Throughput(
            device=device_name(device),
            dtype=str(dtype).removeprefix("torch."),
            batch_size=batch_size,
            compiled=compiled,
            seconds=tuple(seconds[name]),
            peak_mem_mb=ready.peak_mem_mb,
            first_pass_s=ready.first_pass_s if compiled else None,
        )
        for name, ready in prepared.items()
    }


def throughput_where_it_fits(
    builders: dict[str, Callable[[], nn.Module]],
    *,
    image_size: tuple[int, int, int],
    protocol: Protocol,
    device: torch.device | str,
    tell: Tell | None = None,
) -> tuple[dict[str, Throughput | None], bool]:
    """All models in alternation, or one by one where they do not fit together; None: it does not fit even alone.

    The second result says whether they alternated. What was compiled is dropped afterwards, memory with it.
    """

    def measure(names: list[str]) -> dict[str, Throughput]:
        try:
            models = {name: builders[name]() for name in names}
            return throughput(models, image_size=image_size, device=device, tell=tell, **vars(protocol))
        finally:
            release(device)

    measured: dict[str, Throughput | None] = {}
    try:
        return measured | measure(list(builders)), True
    except OutOfMemory as error:
        log.info("%s: measuring one by one", error)
    for name in builders:
        release(device)  # what the exception's frames had kept
        try:
            measured |= measure([name])
        except OutOfMemory as error:
            log.info("%s", error)
            measured[name] = None
    release(device)
    return measured, False


def release(device: torch.device | str) -> None:
    """Forgets all that was compiled, and gives cached memory back to the device."""
    torch._dynamo.reset()
    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether an error, or what it came from, is a device's or the CPU allocator's refusal."""
    while error is not None:
        if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


@dataclass(frozen=True)
class _Prepared:
    """A warm model."""

    run: Callable[[], object]
    """One pass."""
    peak_mem_mb: float | None
    """Of a pass, less what was on the device before this model."""
    first_pass_s: float


def _prepare(
    model: nn.Module, images_BCHW: torch.Tensor, dtype: torch.dtype, compiled: bool, train: bool, warmup: int
) -> _Prepared:
    device = images_BCHW.device
    on_gpu = device.type == "cuda"
    before = torch.cuda.memory_allocated(device) - images_BCHW.nbytes if on_gpu else 0
    model.train(train).to(device)
    call = torch.compile(model, mode="max-autotune" if on_gpu else None) if compiled else model
    run = _training_step(model, call, images_BCHW, dtype) if train else forward_pass(call, images_BCHW, dtype)
    if compiled:
        # An eager image makes what is made on first use: einops' table of backends, which dynamo guards, would
        # otherwise have the second pass compile everything again.
        with torch.no_grad():
            forward_pass(model, images_BCHW[:1], dtype)()
    first_pass_s = timed(run, device)
    for _ in range(warmup):
        run()
    if not on_gpu:
        return _Prepared(run, None, first_pass_s)
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    torch.cuda.synchronize(device)
    return _Prepared(run, (torch.cuda.max_memory_allocated(device) - before) / MIB, first_pass_s)


def forward_pass(
    call: Callable[[torch.Tensor], torch.Tensor], images_BCHW: torch.Tensor, dtype: torch.dtype
) -> Callable[[], torch.Tensor]:
    """A function that asks a model for the logits of these images, under autocast unless dtype is float32."""

    def forward() -> torch.Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        # Entered at every pass, as the paper's code does: weights are cast anew each time.
        with torch.autocast(images_BCHW.device.type, dtype=dtype, enabled=dtype != torch.float32):
            return call(images_BCHW)

    return forward


def _training_step(
    model: nn.Module,
    call: Callable[[torch.Tensor], torch.Tensor],
    images_BCHW: torch.Tensor,
    dtype: torch.dtype,
) -> Callable[[], None]:
    forward = forward_pass(call, images_BCHW, dtype)
    labels_B = torch.zeros(len(images_BCHW), dtype=torch.long, device=images_BCHW.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def step() -> None:
        F.cross_entropy(forward().float(), labels_B).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def timed(run: Callable[[], object], device: torch.device) -> float:
    """Seconds that a function takes, with what it started on the device."""
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start
