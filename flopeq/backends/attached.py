"""Whether anything is attached to a module, such as hooks, an adapter, offloading or quantization.

A layer is called, so that whatever is attached to it takes part. Compiled code may use a layer's weights in a faster
form instead, but only if calling the layer would do nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.modules import module as torch_module

_ignores_hooks = False


def may_use_weights(*layers: nn.Module) -> bool:
    """Whether code may compute with the weights of these layers instead of calling them.

    That is in code that is compiled, exported or traced by torch.jit, for layers that are exactly nn.Linear with plain
    parameters, without hooks and without a replaced `forward`.
    """
    return (torch.compiler.is_compiling() or torch.jit.is_tracing()) and all(map(_is_plain_linear, layers))


def has_hooks(*modules: nn.Module) -> bool:
    """Whether one of these modules has a hook or a replaced `forward`. Hooks on all modules at once do not count."""
    return not _ignores_hooks and any(map(_has_hooks, modules))


@contextmanager
def ignore_hooks() -> Iterator[None]:
    """Within this context hooks do not count as attached. For a counter whose own hooks only watch."""
    global _ignores_hooks
    before, _ignores_hooks = _ignores_hooks, True
    try:
        yield
    finally:
        _ignores_hooks = before


def _is_plain_linear(layer: nn.Module) -> bool:
    return (
        type(layer) is nn.Linear
        and type(layer.weight) is nn.Parameter
        and (layer.bias is None or type(layer.bias) is nn.Parameter)
        and not has_hooks(layer)
        and not torch_module._has_any_global_hook()
    )


def _has_hooks(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )
