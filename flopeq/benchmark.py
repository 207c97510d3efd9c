"""Forward throughput and peak memory, by the paper's protocol (Bökman et al. 2025, appendix B).

The paper: one A100-40GB, batch 64, `torch.compile(mode="max-autotune")`, mixed precision, no gradients, 10
warm-up and 100 timed passes. Here several models take turns, pass by pass, so that whatever slows the machine
down for a while slows them all; compare them by `gain`, the median of the ratios of neighbouring passes.
"""

from __future__ import annotations

import logging
import os
import shutil
import statistics
import sysconfig
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

log = logging.getLogger(__name__)

MIB = 1024 * 1024


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
        if self.runs == 1:
            return self.img_per_s, self.img_per_s
        first, _, third = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return self.batch_size / third, self.batch_size / first


def gain(of: Throughput, over: Throughput) -> float:
    """Median over the runs of how many times faster `of` was than `over`, measured in alternation."""
    return statistics.median(slow / fast for fast, slow in zip(of.seconds, over.seconds, strict=True))


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
) -> dict[str, Throughput]:
    """Times forward passes of all models on images (C, H, W), alternating over them pass by pass.

    The models are put into evaluation mode and moved to the device, where they stay.
    """
    device = torch.device(device)
    compiled = compile and can_compile(device)
    if compile and not compiled:
        log.warning("torch.compile needs a C++ compiler and Python's headers, not found: measuring eager")
    images_BCHW = torch.randn(batch_size, *image_size, device=device)
    # Models of one class share a forward method, whose cache of compilations would otherwise run out.
    with (
        torch.no_grad(),
        torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32),
        torch._dynamo.config.patch(cache_size_limit=8 * max(1, len(models))),
    ):
        passes, peaks = {}, {}
        for name, model in models.items():
            passes[name], peaks[name] = _prepared(model, images_BCHW, compiled, warmup)
        seconds = {name: [] for name in models}
        for _ in range(runs):
            for name, forward in passes.items():
                seconds[name].append(_timed(forward, device))
    return {
        name: Throughput(
            device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            dtype=str(dtype).removeprefix("torch."),
            batch_size=batch_size,
            compiled=compiled,
            seconds=tuple(seconds[name]),
            peak_mem_mb=peaks[name],
        )
        for name in models
    }


def _prepared(
    model: nn.Module, images_BCHW: torch.Tensor, compiled: bool, warmup: int
) -> tuple[Callable[[], object], float | None]:
    """A warm forward pass and its peak memory, less what was on the device before this model."""
    device = images_BCHW.device
    on_gpu = device.type == "cuda"
    before = torch.cuda.memory_allocated(device) - images_BCHW.nbytes if on_gpu else 0
    model.eval().to(device)
    call = torch.compile(model, mode="max-autotune" if on_gpu else None) if compiled else model

    def forward() -> object:
        return call(images_BCHW)

    for _ in range(1 + warmup):
        forward()
    if not on_gpu:
        return forward, None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    forward()
    torch.cuda.synchronize(device)
    return forward, (torch.cuda.max_memory_allocated(device) - before) / MIB


def _timed(forward: Callable[[], object], device: torch.device) -> float:
    start = time.perf_counter()
    forward()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start
