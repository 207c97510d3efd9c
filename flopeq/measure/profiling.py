"""Measures the time of a forward pass by kind of layer, eager and compiled.

Dynamo's graph of a model records the module and the lines of code of every operation, and these determine its kind. In
eager mode the operations of the graph run one by one under labels of their kinds. In compiled mode Inductor names its
kernels by the kinds, so the name of a fused kernel lists the kinds that it contains. The time of a fused kernel cannot
be divided between its kinds. Operations that Inductor leaves to libraries (matrix products, convolutions, attention)
get their kind from their own names.
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
from flopeq.hardware import device_name
from flopeq.measure.throughput import clear_caches, forward_pass, time_call

KINDS = {
    "linear": "linear",
    "attention": "attention",
    "norm": "norm",
    "activation": "activation",
    "convolution": "convolution",
    "basis": "change of basis",
    "other": "other",
}
"""The kinds: name in kernel names -> name in tables. Other: residuals, LayerScale, joining halves, copies."""

_FRAME = re.compile(r'File "([^"]+)", line (\d+), in ')

_LABEL = "flopeq|"

_PASS = _LABEL + "pass"

_CALLS = ("call_function", "call_method", "call_module")

_BASIS_FUNCTIONS = (
    "butterfly",
    "change_basis",
    "mirror_basis",
    "mix_columns",
    "from_raster",
    "to_raster",
    "_change_parts_basis",
)

_OPERATIONS = {
    "convolution": ("conv",),
    "attention": ("attention", "softmax"),
    "norm": ("norm", "var_mean"),
    "activation": ("gelu", "silu", "relu", "sigmoid", "tanh", "swish", "mish"),
    "linear": ("linear", "mm", "einsum"),
}
"""Parts of operation names, by kind. The first kind that matches applies."""

_PRODUCTS = ("matmul", "bmm", "baddbmm", "__matmul__")
"""Matrix products, which belong to attention or to a linear layer, depending on the number of axes."""

_MODULES = {
    "norm": ("Norm", "Affine"),
    "attention": ("Attention",),
    "activation": ("GELU", "SiLU", "ReLU", "Sigmoid", "Tanh"),
    "convolution": ("Conv2d", "PatchConv", "DepthwiseConv", "PatchEmbed", "Stem"),
    "linear": ("Linear", "TokenMixing"),
    "other": ("Block", "LayerScale", "Drop", "Mlp"),
}
"""Parts of module class names, by kind, for operations whose own name does not determine the kind."""


@dataclass(frozen=True)
class Kernel:
    """All operations of one name in a pass: operations of the graph if eager, else library operations or kernels."""

    name: str
    kind: str
    """A key of `Profile.kinds`."""
    ms: float
    calls: int


@dataclass(frozen=True)
class Profile:
    """Times of one forward pass in milliseconds, as medians over passes."""

    model: str
    mode: str
    """`eager` or `compiled`."""
    device: str
    dtype: str
    batch_size: int
    runs: int
    pass_ms: float
    """Wall-clock time of a whole pass, without the profiler."""
    sum_ms: float
    """Total time of all kernels. A pass takes longer if the device waits for Python, and shorter if kernels overlap or
    the profiler slows them down."""
    kinds: dict[str, float]
    """Time by kind. "fused: norm + other" is the time of kernels that contain both kinds."""
    kernels: tuple[Kernel, ...]
    """Kernels, longest first."""
    trace: str | None
    """Path of the Chrome trace."""


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

    On a GPU the model is compiled with `max-autotune` but without CUDA graphs. The kernels are the same, launched one
    by one.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # otherwise it logs its start, and a missing GPU, to stderr
    device = torch.device(device)
    on_gpu = device.type == "cuda"
    model.eval().to(device)
    images_BCHW = torch.randn(batch_size, *image_size, device=device)
    eager_run = forward_pass(model, images_BCHW, dtype)
    eager_run()
    products: set[str] = set()
    backend = _inductor_backend(products, on_gpu) if compiled else _interpreter_backend
    clear_caches(device)
    run = forward_pass(torch.compile(model, backend=backend), images_BCHW, dtype)
    with _kernels_named_by_kind() if compiled else nullcontext():
        run()
    run()
    timed_run = run if compiled else eager_run
    pass_s = [time_call(timed_run, device) for _ in range(runs)]
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
    find = _compiled_kernels(products) if compiled else _labelled_operations
    kinds, kernels = _summarize([list(find(event, on_gpu)) for event in passes])
    clear_caches(device)
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
    """The kind of an operation in Dynamo's graph, a key of KINDS."""
    lines = str(node.meta.get("stack_trace") or "")
    if any(f", in {function}\n" in lines for function in _BASIS_FUNCTIONS):
        return "basis"
    operation = _operation(node)
    called = (node.meta.get("nn_module_stack") or {}).values()
    names = [module if isinstance(module, str) else module.__name__ for _, module in called]
    if operation in _PRODUCTS and _num_axes(node) > 3 and not any("TokenMixing" in name for name in names):
        return "attention"
    if kind := _operation_kind(operation):
        return kind
    for class_name in (*_layers_in_trace(lines), *reversed(names)):
        for kind, parts in _MODULES.items():
            if any(part in class_name.rpartition(".")[2] for part in parts):
                return kind
    return "other"


def _layers_in_trace(stack_trace: str) -> list[str]:
    """The layers of flopeq in a stack trace, innermost first.

    Dynamo's module stack lacks layers that are called by another method than `forward`.
    """
    frames = reversed(_FRAME.findall(stack_trace))
    return [name for path, line in frames for name, code in _layer_lines().get(path, {}).items() if int(line) in code]


@cache
def _layer_lines() -> dict[str, dict[str, range]]:
    """The source lines of each class in flopeq/layers/, by file."""
    found: dict[str, dict[str, range]] = {}
    for name, layer in inspect.getmembers(layers, inspect.isclass):
        if layer.__module__.startswith(f"{layers.__name__}."):
            source, first = inspect.getsourcelines(layer)
            found.setdefault(inspect.getfile(layer), {})[name] = range(first, first + len(source))
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


class _LabelingInterpreter(fx.Interpreter):
    """Runs the operations of a graph one by one, each under a label with its kind and name."""

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


def _interpreter_backend(graph_module: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
    interpreter = _LabelingInterpreter(graph_module)
    return lambda *inputs: interpreter.run(*inputs)


def _inductor_backend(products: set[str], on_gpu: bool) -> Callable[..., Any]:
    """An Inductor backend that passes the kind of each operation to Inductor.

    It adds the kinds of matrix products to `products`.
    """
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
    """Inductor settings that put the kinds into kernel names, and show CPU kernels in profiles."""
    from torch._inductor import config

    named = {"cpp.descriptive_names": "torch", "triton.descriptive_names": "torch", "cpp.enable_kernel_profile": True}
    # The key of the graph cache does not include the kinds.
    return config.patch(named | {"fx_graph_cache": False})


_TimedOperation = tuple[str, str, float]
"""Kind, name and milliseconds of an operation."""


def _labelled_operations(event: FunctionEvent, on_gpu: bool) -> Iterator[_TimedOperation]:
    """The labelled operations among the descendants of an event."""
    if event.name.startswith(_LABEL) and event.name != _PASS:
        _, kind, operation = event.name.split("|")
        ms = _device_ms(event) if on_gpu else sum(child.cpu_time_total for child in event.cpu_children) / 1e3
        yield KINDS[kind], operation, ms
        return
    for child in event.cpu_children:
        yield from _labelled_operations(child, on_gpu)


def _compiled_kernels(products: set[str]) -> Callable[[FunctionEvent, bool], Iterator[_TimedOperation]]:
    def find(event: FunctionEvent, on_gpu: bool) -> Iterator[_TimedOperation]:
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
    """The kinds in a kernel or a library operation, by its name; None for any other event."""
    if fused := re.search(r"(?:^|_)fused_([a-z_]+?)(?:_\d+)?$", name):
        kinds = [label for kind, label in KINDS.items() if kind in fused[1].split("_")]
        return kinds[0] if len(kinds) == 1 else "fused: " + " + ".join(kinds or ["other"])
    operation = re.fullmatch(r"\w+::(\w+)", name)
    if not operation:
        return None
    if operation[1] in _PRODUCTS and products:
        kinds = [label for kind, label in KINDS.items() if kind in products]
        return " or ".join(kinds)
    return KINDS[_operation_kind(operation[1]) or "other"]


def _device_ms(event: FunctionEvent) -> float:
    """Milliseconds of all kernels launched by an event and its descendants."""
    own = sum(kernel.duration for kernel in event.kernels) / 1e3
    return own + sum(_device_ms(child) for child in event.cpu_children)


def _summarize(passes: list[list[_TimedOperation]]) -> tuple[dict[str, float], tuple[Kernel, ...]]:
    """Medians over passes, by kind and by kernel. Kinds are in the order of KINDS, fused ones last."""
    by_kind = _medians([[(kind, ms) for kind, _, ms in operations] for operations in passes])
    by_kernel = _medians([[((kind, name), ms) for kind, name, ms in operations] for operations in passes])
    calls = defaultdict(int)
    for kind, name, _ in passes[0]:
        calls[kind, name] += 1
    kernels = [Kernel(name, kind, ms, calls[kind, name]) for (kind, name), ms in by_kernel.items()]
    order = {label: index for index, label in enumerate(KINDS.values())}
    kinds = sorted(by_kind, key=lambda kind: (order.get(kind, len(order)), -by_kind[kind]))
    return {kind: by_kind[kind] for kind in kinds}, tuple(sorted(kernels, key=lambda kernel: -kernel.ms))


def _medians(passes: list[list[tuple[Any, float]]]) -> dict[Any, float]:
    """The median over passes of the total milliseconds of each key."""
    totals: list[dict[Any, float]] = []
    for operations in passes:
        totals.append(defaultdict(float))
        for key, ms in operations:
            totals[-1][key] += ms
    keys = dict.fromkeys(key for total in totals for key in total)
    return {key: statistics.median([total.get(key, 0.0) for total in totals]) for key in keys}
