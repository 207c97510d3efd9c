"""Builds and compiles a network in its own process, compares it with a float32 reference, and times it on request."""

from __future__ import annotations

import collections
import os
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import Pipe, Process
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

SMALL = {
    "vit": {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 2},
    "resmlp": {"img_size": 64, "patch_size": 16, "embed_dim": 64, "num_blocks": 2},
    "convnext_iso": {"patch_size": 8, "embed_dim": 64, "depth": 2},
}
"""Model arguments for a dry run."""


@dataclass(frozen=True)
class Job:
    """A network to build, and the mode to run it in."""

    mode: str
    """`forward`, `train`, or `max-autotune`: a forward pass compiled in that mode."""
    family: str
    size: str
    who: str
    """X, E, H, a block's variant, or `authors`."""
    model: str
    block: str
    authors: str | None
    """The checkout of the authors' code, for their network."""
    dry: bool

    @property
    def name(self) -> str:
        return f"{self.mode} {self.family}-{self.size} {self.who}"

    def columns(self) -> dict[str, str]:
        """What identifies a row of results."""
        return {key: asdict(self)[key] for key in ("mode", "family", "size", "who", "model")}

    def is_baseline_of(self, other: Job) -> bool:
        """Whether this is the X that the other takes turns with."""
        same = (self.mode, self.family, self.size) == (other.mode, other.family, other.size)
        return same and self.who == "X" and other.who != "X"


class Network:
    """The other end of a worker's pipe."""

    def __init__(self, job: Job, threads: int) -> None:
        self.pipe, theirs = Pipe()
        self.process = Process(target=_work, args=(job, theirs, threads), daemon=True)
        self.process.start()
        theirs.close()
        self.facts: dict[str, Any] = {}
        self.error: str | None = None

    def is_settled(self, timeout: float) -> bool:
        """Whether the network is ready, or has failed with `error`."""
        if self.facts or self.error:
            return True
        if self.pipe.poll(timeout):
            try:
                self.facts, self.error = self.pipe.recv()
            except EOFError:
                self.error = "the process ended"
        return bool(self.facts or self.error)

    def ask(self, *request: Any, timeout_s: float = 60) -> Any:
        """The answer to `("time", passes)` or `("profile",)`."""
        self.pipe.send(request)
        if not self.pipe.poll(timeout_s):
            raise TimeoutError(f"no answer to {request}")
        return self.pipe.recv()

    def close(self) -> None:
        self.process.terminate()
        self.process.join(10)


def _work(job: Job, pipe: Connection, threads: int) -> None:
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = str(threads)
    try:
        facts, run, sync = _prepare(job)
        pipe.send((facts, None))
        while True:
            match pipe.recv():
                case "time", passes:
                    pipe.send(_time(run, sync, passes))
                case ("profile",):
                    pipe.send(_profile(run, sync, job.dry))
    except Exception:
        pipe.send(({}, traceback.format_exc(limit=-8)[-3000:]))


def _prepare(job: Job) -> tuple[dict[str, Any], Callable[[], object], Callable[[], object]]:
    import torch

    import flopeq  # noqa: F401
    from flopeq.measure.throughput import MIB, _training_step, forward_pass

    torch.manual_seed(0)
    device, dtype = ("cpu", torch.bfloat16) if job.dry else ("cuda", torch.float16)
    model = _build(job).to(device)
    _reveal_blocks(model)
    batch_size, image_size = (2, 64 if job.family == "resmlp" else 32) if job.dry else (64, 224)
    images = torch.randn(batch_size, 3, image_size, image_size, device=device)
    facts = _compare(model, images[:8], job)
    train = job.mode == "train"
    model.train(train)
    before = 0 if job.dry else torch.cuda.memory_allocated()
    # Triton compiles for GPUs only.
    mode = job.mode if job.mode == "max-autotune" else "reduce-overhead"
    call = model if job.dry and job.block == "triton" else torch.compile(model, mode=None if job.dry else mode)
    once = _training_step(model, call, images, dtype) if train else forward_pass(call, images, dtype)
    sync = (lambda: None) if job.dry else torch.cuda.synchronize

    def run() -> object:
        with torch.set_grad_enabled(train):
            return once()

    start = time.perf_counter()
    logits = run()
    sync()
    facts["first_pass_s"] = round(time.perf_counter() - start, 2)
    if not train:
        with torch.no_grad():
            facts["compiled_error"] = _distance(logits[:8].float(), _reference(model, images[:8], job))
    facts["peak_mem_mb"] = None
    if not job.dry:
        # The second pass records the CUDA graph and allocates its memory. Later passes replay the graph.
        sync()
        torch.cuda.reset_peak_memory_stats()
        run()
        sync()
        weights = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
        facts["peak_mem_mb"] = round((torch.cuda.max_memory_allocated() - before + weights + images.nbytes) / MIB, 1)
    for _ in range(4):
        run()
    return facts, run, sync


def _build(job: Job) -> Any:
    """The network, in evaluation mode."""
    import timm

    if job.authors:
        from benchmarks.equivariant import of_authors
        from flopeq.registry import MODELS
        from tests.hub.authors.make_fixture import stand_in_for_old_timm

        stand_in_for_old_timm(Path(job.authors))
        return of_authors(MODELS[job.model], fused=True)
    if job.block != "library":
        from gpu_blocks import use_block

        use_block(job.block)
    if job.dry and job.model.startswith("resmlp"):
        from timm.layers import Affine
        from timm.models.mlp_mixer import MlpMixer, ResBlock

        small = partial(MlpMixer, block_layer=ResBlock, norm_layer=Affine, mlp_ratio=4)
        return small(**SMALL["resmlp"]).eval()
    return timm.create_model(job.model, **(SMALL[job.family] if job.dry else {})).eval()


def _reveal_blocks(model: Any) -> None:
    """Weights under which blocks matter: LayerScales of 1e-4 would hide what they do."""
    import torch

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(word in name for word in ("gamma", "ls1", "ls2")):
                parameter.fill_(0.3)
            elif parameter.ndim == 1 and parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))


def _compare(model: Any, images: Any, job: Job) -> dict[str, Any]:
    """Relative distances of eager logits: autocast from float32, and an image's flop from the image."""
    import torch

    facts: dict[str, Any] = {}
    with torch.no_grad():
        expected = _reference(model, images, job)
        if job.block == "triton" and not job.dry:
            return facts  # tuning again for each dtype would take minutes
        if job.who in ("E", "batched", "triton", "authors"):
            facts["flop_error_float32"] = _distance(model(images.flip(-1)), expected)
        for name in ("float16", "bfloat16"):
            with torch.autocast(images.device.type, dtype=getattr(torch, name)):
                facts[f"{name}_error"] = _distance(model(images).float(), expected)
    return facts


def _reference(model: Any, images: Any, job: Job) -> Any:
    """Logits in float32, by the library's own block."""
    if job.block == "library":
        return model(images)
    from gpu_blocks import use_block

    use_block("library")
    logits = model(images)
    use_block(job.block)
    return logits


def _distance(found: Any, expected: Any) -> float:
    return float(f"{float((found - expected).norm() / expected.norm()):.3g}")


def _time(run: Callable[[], object], sync: Callable[[], object], passes: int) -> list[float]:
    """Seconds of each pass, after five that are not counted."""
    seconds = []
    for index in range(5 + passes):
        sync()
        start = time.perf_counter()
        run()
        sync()
        if index >= 5:
            seconds.append(time.perf_counter() - start)
    return seconds


def _profile(run: Callable[[], object], sync: Callable[[], object], dry: bool) -> list[dict[str, Any]]:
    """Kernels by the time that they take in a pass: name, launches, microseconds."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU] if dry else [ProfilerActivity.CUDA]) as profiler:
        for _ in range(3):
            run()
        sync()
    kernels: dict[str, list[float]] = collections.defaultdict(lambda: [0, 0.0])
    for event in profiler.events():
        if dry or event.device_type == torch.autograd.DeviceType.CUDA:
            kernels[event.name][0] += 1
            kernels[event.name][1] += event.self_cpu_time_total if dry else event.self_device_time_total
    rows = sorted(kernels.items(), key=lambda item: -item[1][1])[:40]
    return [
        {"kernel": name[:100], "launches": round(count / 3, 2), "us": round(us / 3, 2)} for name, (count, us) in rows
    ]
