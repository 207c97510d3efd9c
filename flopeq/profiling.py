"""Where the time of a forward pass goes, by kind of layer: run operation by operation, and compiled.

Dynamo's graph of a model knows for every operation the module and the lines of code that it comes from, and from these
it gets a kind. Eagerly, the graph's operations are run one by one under labels of their kinds. Compiled, the kinds are
what Inductor names its kernels by, so that a fused kernel says which kinds it holds; how its time divides between them
cannot be measured. Operations that Inductor leaves to libraries (matrix products, convolutions, attention) are told by
their own names.
"""

from __future__ import annotations

import inspect
import os
import re
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, record_function

from flopeq import layers
from flopeq.benchmark import device_name, forward_pass, release, timed

KINDS = {
    "linear": "linear",
    "attention": "attention",
    "norm": "norm",
    "activation": "activation",
    "convolution": "convolution",
    "basis": "change of basis",
    "other": "other",
}
"""What the kinds are called in kernels' names, and in tables. Other: residuals, LayerScale, joining halves, copies."""

_FRAME = re.compile(r'File "([^"]+)", line (\d+), in ')
_LABEL = "flopeq|"
_PASS = _LABEL + "pass"
_CALLS = ("call_function", "call_method", "call_module")
_BASIS_FUNCTIONS = ("butterfly", "change_basis", "mirror_basis", "mix", "from_raster", "to_raster", "_swap_basis")
_OPERATIONS = {
    "convolution": ("conv",),
    "attention": ("attention", "softmax"),
    "norm": ("norm", "var_mean"),
    "activation": ("gelu", "silu", "relu", "sigmoid", "tanh", "swish", "mish"),
    "linear": ("linear", "mm", "einsum"),
}
"""Kinds by parts of operations' names; the first that fits."""
_PRODUCTS = ("matmul", "bmm", "baddbmm", "__matmul__")
"""Of the scores in attention, or of a linear layer: the number of axes tells."""
_MODULES = {
    "norm": ("Norm", "Affine"),
    "attention": ("Attention",),
    "activation": ("GELU", "SiLU", "ReLU", "Sigmoid", "Tanh"),
    "convolution": ("Conv2d", "PatchConv", "DepthwiseConv", "PatchEmbed", "Stem"),
    "linear": ("Linear", "TokenMixing"),
    "other": ("Block", "LayerScale", "Drop", "Mlp"),
}
"""Kinds by parts of modules' class names, for what the operation itself does not tell."""


@dataclass(frozen=True)
class Kernel:
    """Operations of one name in a pass: of the graph when eager, else a library's, or a fused kernel."""

    name: str
    kind: str
    """As in `Profile.kinds`."""
    ms: float
    calls: int


@dataclass(frozen=True)
class Profile:
    """Times of one forward pass in milliseconds: medians over passes."""

    model: str
    mode: str
    """`eager` or `compiled`."""
    device: str
    dtype: str
    batch_size: int
    runs: int
    pass_ms: float
    """A whole pass, on the clock and without the profiler."""
    sum_ms: float
    """All kernels together. A pass takes longer where the device waits for Python, shorter where kernels overlap or the
    profiler weighs on them."""
    kinds: dict[str, float]
    """Time by kind; "fused: norm + other" is the time of kernels that hold both."""
    kernels: tuple[Kernel, ...]
    """Longest first."""
    trace: str | None
    """The Chrome trace's file."""


@torch.no_grad()
def profile(
    model: nn.Module,
    name: str,
    *,
    image_size: tuple[int, int, int],
    batch_size: int,
    dtype: torch.dtype,
    device: torch.device | str,
    compiled: bool,
    runs: int,
    trace: Path | None = None,
) -> Profile:
    """Profiles forward passes of a model in evaluation mode on random images (C, H, W), under autocast to `dtype`.

    On a GPU the compiled model is that of `max-autotune` without CUDA graphs: the same kernels, launched one by one.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else it tells stderr when it starts, and that it finds no GPU
    device = torch.device(device)
    on_gpu = device.type == "cuda"
    model.eval().to(device)
    images_BCHW = torch.randn(batch_size, *image_size, device=device)
    plain = forward_pass(model, images_BCHW, dtype)
    plain()
    products: set[str] = set()
    backend = _compiling(products, on_gpu) if compiled else _interpreting
    release(device)
    run = forward_pass(torch.compile(model, backend=backend), images_BCHW, dtype)
    with _kernels_named_by_kind() if compiled else nullcontext():
        run()
    run()
    real = run if compiled else plain
    pass_s = [timed(real, device) for _ in range(runs)]
    with torch.profiler.profile(activities=[ProfilerActivity.CPU] + on_gpu * [ProfilerActivity.CUDA]) as profiler:
        for _ in range(runs):
            with record_function(_PASS):
                run()
                if on_gpu:
                    torch.cuda.synchronize(device)
    if trace:
        trace.parent.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(trace))
    passes = [event for event in profiler.events() or () if event.name == _PASS]
    find = _compiled_kernels(products) if compiled else _labelled
    kinds, kernels = _summary([list(find(event, on_gpu)) for event in passes])
    release(device)
    return Profile(
        model=name,
        mode="compiled" if compiled else "eager",
        device=device_name(device),
        dtype=str(dtype).removeprefix("torch."),
        batch_size=batch_size,
        runs=runs,
        pass_ms=1e3 * statistics.median(pass_s),
        sum_ms=sum(kinds.values()),
        kinds=kinds,
        kernels=kernels,
        trace=str(trace) if trace else None,
    )


def kind_of(node: fx.Node) -> str:
    """The kind, a key of KINDS, of an operation in Dynamo's graph."""
    lines = str(node.meta.get("stack_trace") or "")
    if any(f", in {function}\n" in lines for function in _BASIS_FUNCTIONS):
        return "basis"
    operation = _operation(node)
    if operation in _PRODUCTS and _num_axes(node) > 3:
        return "attention"
    if kind := _operation_kind(operation):
        return kind
    called = (node.meta.get("nn_module_stack") or {}).values()
    names = [module if isinstance(module, str) else module.__name__ for _, module in called]
    for class_name in (*_layers_at(lines), *reversed(names)):
        for kind, parts in _MODULES.items():
            if any(part in class_name.rpartition(".")[2] for part in parts):
                return kind
    return "other"


def _layers_at(stack_trace: str) -> list[str]:
    """Our layers whose code a stack trace goes through, innermost first: Dynamo notes no call of a layer's method."""
    lines = [int(line) for path, line in _FRAME.findall(stack_trace) if path == layers.__file__]
    return [name for line in reversed(lines) for name, code in _layers_code().items() if line in code]


@cache
def _layers_code() -> dict[str, range]:
    """The lines of each class in flopeq/layers.py."""
    found = {}
    for name, layer in inspect.getmembers(layers, inspect.isclass):
        if layer.__module__ == layers.__name__:
            source, first = inspect.getsourcelines(layer)
            found[name] = range(first, first + len(source))
    return found


def _operation(node: fx.Node) -> str:
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))


def _operation_kind(operation: str) -> str | None:
    if operation in _PRODUCTS:
        return "linear"
    return next((kind for kind, parts in _OPERATIONS.items() if any(part in operation for part in parts)), None)


def _num_axes(node: fx.Node) -> int:
    first = node.args[0] if node.args else None
    value = first.meta.get("example_value") if isinstance(first, fx.Node) else None
    return value.ndim if isinstance(value, torch.Tensor) else 0


class _Labelled(fx.Interpreter):
    """Runs a graph's operations one by one, each under a label with its kind and name."""

    def __init__(self, graph_module: fx.GraphModule) -> None:
        super().__init__(graph_module)
        self.labels = {
            node: f"{_LABEL}{kind_of(node)}|{_operation(node)}"
            for node in graph_module.graph.nodes
            if node.op in _CALLS
        }

    def run_node(self, n: fx.Node) -> Any:
        label = self.labels.get(n)
        with record_function(label) if label else nullcontext():
            return super().run_node(n)


def _interpreting(graph_module: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
    interpreter = _Labelled(graph_module)
    return lambda *inputs: interpreter.run(*inputs)


def _compiling(products: set[str], on_gpu: bool) -> Callable[..., Any]:
    """A backend: Inductor, told the kind of each operation. Batched products' kinds are added to `products`."""
    from torch._inductor import list_mode_options
    from torch._inductor.compile_fx import compile_fx

    options = list_mode_options("max-autotune-no-cudagraphs") if on_gpu else {}

    def backend(graph_module: fx.GraphModule, example_inputs: list[Any]) -> Any:
        for node in graph_module.graph.nodes:
            if node.op in _CALLS:
                kind = kind_of(node)
                node.meta["source_fn_stack"] = [(node.name, kind)]
                if _operation(node) in _PRODUCTS:
                    products.add(kind)
        return compile_fx(graph_module, example_inputs, config_patches=options)

    return backend


def _kernels_named_by_kind() -> Any:
    """Inductor's settings under which a kernel's name holds the kinds, and kernels on a CPU show in profiles."""
    from torch._inductor import config

    named = {"cpp.descriptive_names": "torch", "triton.descriptive_names": "torch", "cpp.enable_kernel_profile": True}
    # The cache's key knows nothing of the kinds.
    return config.patch(named | {"fx_graph_cache": False})


_Found = tuple[str, str, float]
"""A kernel's kind, its name, and its ms."""


def _labelled(event: FunctionEvent, on_gpu: bool) -> Iterator[_Found]:
    """The labelled operations below an event."""
    if event.name.startswith(_LABEL) and event.name != _PASS:
        _, kind, operation = event.name.split("|")
        ms = _device_ms(event) if on_gpu else sum(child.cpu_time_total for child in event.cpu_children) / 1e3
        yield KINDS[kind], operation, ms
        return
    for child in event.cpu_children:
        yield from _labelled(child, on_gpu)


def _compiled_kernels(products: set[str]) -> Callable[[FunctionEvent, bool], Iterator[_Found]]:
    def find(event: FunctionEvent, on_gpu: bool) -> Iterator[_Found]:
        kind = _kernel_kind(event.name, products)
        if kind is not None:
            yield kind, event.name, _device_ms(event) if on_gpu else event.cpu_time_total / 1e3
            return
        for launched in event.kernels:
            yield _kernel_kind(launched.name, products) or "other", launched.name, launched.duration / 1e3
        for child in event.cpu_children:
            yield from find(child, on_gpu)

    return find


def _kernel_kind(name: str, products: set[str]) -> str | None:
    """What a kernel or a library's operation holds, by its name; None for what is neither."""
    if fused := re.search(r"(?:^|_)fused_([a-z_]+?)(?:_\d+)?$", name):
        held = [shown for kind, shown in KINDS.items() if kind in fused[1].split("_")]
        return held[0] if len(held) == 1 else "fused: " + " + ".join(held or ["other"])
    operation = re.fullmatch(r"\w+::(\w+)", name)
    if not operation:
        return None
    if operation[1] in _PRODUCTS and products:
        held = [shown for kind, shown in KINDS.items() if kind in products]
        return " or ".join(held)
    return KINDS[_operation_kind(operation[1]) or "other"]


def _device_ms(event: FunctionEvent) -> float:
    """Time of all kernels that were launched below an event."""
    own = sum(kernel.duration for kernel in event.kernels) / 1e3
    return own + sum(_device_ms(child) for child in event.cpu_children)


def _summary(passes: list[list[_Found]]) -> tuple[dict[str, float], tuple[Kernel, ...]]:
    """Medians over passes: by kind, in KINDS' order and then fused ones; and by kernel."""
    by_kind = _medians([[(kind, ms) for kind, _, ms in found] for found in passes])
    by_kernel = _medians([[((kind, name), ms) for kind, name, ms in found] for found in passes])
    calls = defaultdict(int)
    for kind, name, _ in passes[0]:
        calls[kind, name] += 1
    kernels = [Kernel(name, kind, ms, calls[kind, name]) for (kind, name), ms in by_kernel.items()]
    order = {shown: place for place, shown in enumerate(KINDS.values())}
    kinds = sorted(by_kind, key=lambda kind: (order.get(kind, len(order)), -by_kind[kind]))
    return {kind: by_kind[kind] for kind in kinds}, tuple(sorted(kernels, key=lambda kernel: -kernel.ms))


def _medians(passes: list[list[tuple[Any, float]]]) -> dict[Any, float]:
    sums: list[dict[Any, float]] = []
    for found in passes:
        sums.append(defaultdict(float))
        for key, ms in found:
            sums[-1][key] += ms
    keys = dict.fromkeys(key for one in sums for key in one)
    return {key: statistics.median([one.get(key, 0.0) for one in sums]) for key in keys}
