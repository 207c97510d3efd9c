"""Throughput and peak memory, by the paper's protocol (Bökman et al. 2025, appendix B).

The paper: one A100-40GB, batch 64, `torch.compile(mode="max-autotune")`, mixed precision, no gradients, 10
warm-up and 100 timed passes. Here several models alternate pass by pass, so that a temporary slowdown of the
machine affects all of them. `throughput_ratio` compares two models by the median of the ratios of neighbouring
passes. A pass is a forward pass or, on request, a training step: forward, backward, optimizer.
"""

from __future__ import annotations

import gc
import logging
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from flopeq.hardware import can_compile, device_name

log = logging.getLogger(__name__)

MIB = 1024 * 1024

ProgressCallback = Callable[[str, int, int], object]
"""Called with the name of the running model, the number of passes done, and their total."""


class ModelOutOfMemoryError(RuntimeError):
    """Raised when a model does not fit into the device's memory. `model` is its name."""

    def __init__(self, model: str) -> None:
        super().__init__(f"{model} does not fit into memory: use a smaller batch")
        self.model = model


@dataclass(frozen=True)
class Protocol:
    """Settings of a measurement. `PAPER` and `CPU` are the defaults of `flopeq throughput`."""

    batch_size: int
    """Images per pass."""
    warmup: int
    """Untimed passes per model, after the one that compiles."""
    runs: int
    """Timed passes per model."""
    dtype: torch.dtype
    """Autocast dtype; float32 turns autocast off."""
    compile: bool
    """Whether to compile the model, in mode `max-autotune` on a GPU and in the default mode on a CPU."""
    train: bool = False
    """Whether a pass is a training step: forward, cross-entropy, backward and AdamW, without a gradient scaler."""


PAPER = Protocol(batch_size=64, warmup=10, runs=100, dtype=torch.float16, compile=True)

CPU = Protocol(batch_size=8, warmup=2, runs=10, dtype=torch.float32, compile=True)


def protocol_for(device: torch.device | str) -> Protocol:
    """The paper's protocol on a GPU, a shorter one in float32 on a CPU."""
    return PAPER if torch.device(device).type == "cuda" else CPU


@dataclass(frozen=True)
class Throughput:
    """Measured times and memory of one model, with the conditions of the measurement."""

    device: str
    """The name of the GPU, or `cpu`."""
    dtype: str
    batch_size: int
    compiled: bool
    seconds: tuple[float, ...]
    """Duration of each timed pass, in order."""
    peak_mem_mb: float | None
    """MiB of device memory for weights, images and activations, as the paper's "MB"; None on a CPU."""
    first_pass_s: float | None = None
    """Duration of the pass that compiles, which is short if torch's cache has the compiled code; None if eager."""

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
        """First and third quartile of the images per second of the passes."""
        first, third = quartiles(self.seconds)
        return self.batch_size / third, self.batch_size / first


def throughput_ratios(model: Throughput, baseline: Throughput) -> list[float]:
    """Throughput of the model over that of the baseline for each pair of neighbouring passes.

    Both must come from one measurement in which they alternated.
    """
    return [slow / fast for fast, slow in zip(model.seconds, baseline.seconds, strict=True)]


def throughput_ratio(model: Throughput, baseline: Throughput) -> float:
    """Median of `throughput_ratios`."""
    return statistics.median(throughput_ratios(model, baseline))


def quartiles(values: list[float] | tuple[float, ...]) -> tuple[float, float]:
    """First and third quartile; both are the value itself if there is only one."""
    if len(values) == 1:
        return values[0], values[0]
    first, _, third = statistics.quantiles(values, n=4, method="inclusive")
    return first, third


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
    on_progress: ProgressCallback | None = None,
) -> dict[str, Throughput]:
    """Times passes of all models on random images (C, H, W). The models alternate pass by pass.

    The function sets the models to evaluation mode, or to training mode for training steps. It moves them to the
    device and leaves them there.
    Raises: ModelOutOfMemoryError if they do not fit into the device's memory together.
    """
    device = torch.device(device)
    compiled = compile and can_compile(device)
    if compile and not compiled:
        log.warning("no C++ compiler or Python headers for torch.compile: measuring eager")
    images_BCHW = torch.randn(batch_size, *image_size, device=device)
    done, total = 0, len(models) * (1 + warmup + runs)
    warm: dict[str, _WarmModel] = {}
    seconds: dict[str, list[float]] = {name: [] for name in models}
    name = ""
    try:
        # Models of one class share a forward method, and its cache of compilations would overflow otherwise.
        with torch.set_grad_enabled(train), torch._dynamo.config.patch(cache_size_limit=8 * max(1, len(models))):
            for name, model in models.items():
                if on_progress:
                    on_progress(name, done, total)
                warm[name] = _warm_up(model, images_BCHW, dtype, compiled, train, warmup)
                done += 1 + warmup
            for _ in range(runs):
                for name, warm_model in warm.items():
                    if on_progress:
                        on_progress(name, done, total)
                    seconds[name].append(time_call(warm_model.run, device))
                    done += 1
    except Exception as error:
        if is_out_of_memory(error):
            raise ModelOutOfMemoryError(name) from error
        raise
    return {
        name: Throughput(
            device=device_name(device),
            dtype=str(dtype).removeprefix("torch."),
            batch_size=batch_size,
            compiled=compiled,
            seconds=tuple(seconds[name]),
            peak_mem_mb=warm_model.peak_mem_mb,
            first_pass_s=warm_model.first_pass_s if compiled else None,
        )
        for name, warm_model in warm.items()
    }


def measure_throughput_if_fits(
    builders: dict[str, Callable[[], nn.Module]],
    *,
    image_size: tuple[int, int, int],
    protocol: Protocol,
    device: torch.device | str,
    on_progress: ProgressCallback | None = None,
) -> tuple[dict[str, Throughput | None], bool]:
    """Measures all models in alternation, or one by one if they do not fit into memory together.

    The result of a model that does not fit even alone is None. The second value returned is whether the models
    alternated. Afterwards the function clears the compiled code and frees the device's memory.
    """

    def measure(names: list[str]) -> dict[str, Throughput]:
        try:
            models = {name: builders[name]() for name in names}
            return throughput(models, image_size=image_size, device=device, on_progress=on_progress, **vars(protocol))
        finally:
            clear_caches(device)

    measured: dict[str, Throughput | None] = {}
    try:
        return measured | measure(list(builders)), True
    except ModelOutOfMemoryError as error:
        log.info("%s: measuring one by one", error)
    for name in builders:
        clear_caches(device)  # the exception's frames kept the models of the failed measurement alive
        try:
            measured |= measure([name])
        except ModelOutOfMemoryError as error:
            log.info("%s", error)
            measured[name] = None
    clear_caches(device)
    return measured, False


def clear_caches(device: torch.device | str) -> None:
    """Drops all compiled code and returns cached memory to the device."""
    torch._dynamo.reset()
    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether an error or one of its causes is a failed allocation on the device or the CPU."""
    while error is not None:
        if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


@dataclass(frozen=True)
class _WarmModel:
    """A model after its warm-up passes."""

    run: Callable[[], object]
    """Runs one pass."""
    peak_mem_mb: float | None
    """Peak memory of a pass, minus the memory in use before this model; None on a CPU."""
    first_pass_s: float


def _warm_up(
    model: nn.Module, images_BCHW: torch.Tensor, dtype: torch.dtype, compiled: bool, train: bool, warmup: int
) -> _WarmModel:
    device = images_BCHW.device
    on_gpu = device.type == "cuda"
    before = torch.cuda.memory_allocated(device) - images_BCHW.nbytes if on_gpu else 0
    model.train(train).to(device)
    call = torch.compile(model, mode="max-autotune" if on_gpu else None) if compiled else model
    run = _training_step(model, call, images_BCHW, dtype) if train else forward_pass(call, images_BCHW, dtype)
    if compiled:
        # One eager image fills the caches that are filled on first use. Dynamo guards einops' table of backends:
        # if the first compiled pass filled it, the second pass would compile everything again.
        with torch.no_grad():
            forward_pass(model, images_BCHW[:1], dtype)()
    first_pass_s = time_call(run, device)
    for _ in range(warmup):
        run()
    if not on_gpu:
        return _WarmModel(run, None, first_pass_s)
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    torch.cuda.synchronize(device)
    return _WarmModel(run, (torch.cuda.max_memory_allocated(device) - before) / MIB, first_pass_s)


def forward_pass(
    call: Callable[[torch.Tensor], torch.Tensor], images_BCHW: torch.Tensor, dtype: torch.dtype
) -> Callable[[], torch.Tensor]:
    """A function that computes the logits of these images, under autocast unless dtype is float32."""

    def forward() -> torch.Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        # Autocast starts anew for every pass, as in the paper's code, so each pass casts the weights again.
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


def time_call(run: Callable[[], object], device: torch.device) -> float:
    """Seconds that a function takes, including the work that it starts on the device."""
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start
