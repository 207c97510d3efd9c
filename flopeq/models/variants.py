"""Code shared by all families: number of equivariant blocks, invariant head, and registration in timm."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn
from torch.fx._symbolic_trace import is_fx_symbolic_tracing

from flopeq.backends.attached import has_hooks
from flopeq.irreps import join, split
from flopeq.registry import PREFIXES

HEADS = ("even", "even+abs_odd")


def check_num_flop_blocks(num_flop_blocks: int, depth: int) -> None:
    """Raises ValueError if the number of equivariant blocks is not between 0 and depth."""
    if not 0 <= num_flop_blocks <= depth:
        raise ValueError(f"num_flop_blocks={num_flop_blocks} is not valid: use 0 (X) to {depth} (E)")


def refuse_arguments(args: Mapping[str, Any], reasons: Mapping[str, str]) -> None:
    """Raises ValueError with the reason for an argument of timm's model that the network does not take."""
    for name in reasons:
        if args.get(name) is not None:
            raise ValueError(f"{name}={args[name]!r} is not supported: {reasons[name]}")


def check_head(head: str, equivariant: bool) -> None:
    """Raises ValueError for an unknown value of `head`, or one that has no effect."""
    if head not in HEADS:
        raise ValueError(f"head={head!r} is unknown: use one of {', '.join(map(repr, HEADS))}")
    if not equivariant and head != "even":
        raise ValueError(f"head={head!r} has no effect after ordinary blocks: leave it out, or use E(X)")


class BlockSequence(nn.Sequential):
    """nn.Sequential that passes keyword arguments to its last block."""

    def forward(self, x: Tensor, **last_block_args: Any) -> Tensor:
        *blocks, last = self
        for block in blocks:
            x = block(x)
        return last(x, **last_block_args)


class InvariantHead:
    """Mixin for timm models whose classifier sees `head_hidden_size` invariant features."""

    num_classes: int
    embed_dim: int
    blocks: nn.Sequential
    head: nn.Module
    head_hidden_size: int
    training: bool

    def resize_head(self, head_hidden_size: int, **dd: Any) -> None:
        """Gives the classifier another number of input features. It keeps its first initial weights."""
        self.head_hidden_size = head_hidden_size
        if isinstance(self.head, nn.Linear):
            fresh = nn.Linear(head_hidden_size, self.num_classes, **dd)
            fresh.weight.data.copy_(self.head.weight.data[:, :head_hidden_size])
            fresh.bias.data.copy_(self.head.bias.data)
            self.head = fresh

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replaces the classifier by a new one for `num_classes` classes; 0 removes it and keeps the pooling."""
        super().reset_classifier(num_classes, global_pool)  # pyright: ignore[reportAttributeAccessIssue]
        if isinstance(self.head, nn.Linear) and self.head.in_features != self.head_hidden_size:
            weight = self.head.weight
            self.head = nn.Linear(self.head_hidden_size, num_classes, device=weight.device, dtype=weight.dtype)
            self.head.train(self.training)

    def __prepare_scriptable__(self) -> nn.Module:
        raise NotImplementedError(
            f"{type(self).__name__} does not support torch.jit.script, which torch has deprecated: use torch.compile "
            "or torch.export"
        )


class FlopHead(InvariantHead):
    """Mixin for timm models that gives the head of an equivariant network invariant features only.

    `head="even"` selects the even half of the channels, as in the paper. `"even+abs_odd"` appends the absolute values
    of the odd half, which are also invariant (an option of the authors' code).
    """

    def init_head(self, head: str, equivariant: bool, **dd: Any) -> None:
        """Resizes the classifier to the number of invariant features. Raises: ValueError as `check_head` does."""
        check_head(head, equivariant)
        self.equivariant = equivariant
        self.append_abs_odd = head == "even+abs_odd"
        if equivariant and not self.append_abs_odd:
            self.resize_head(self.embed_dim // 2, **dd)

    def invariants(self, x: Tensor, dim: int = -1) -> Tensor:
        """The features for the head. `dim` is the channel axis."""
        if not self.equivariant:
            return x
        even, odd = split(x, dim)
        return join(even, odd.abs(), dim) if self.append_abs_odd else even

    @property
    def skips_odd_half(self) -> bool:
        """Whether the last block skips the features that the head does not use.

        It does not in training, because data parallelism needs a gradient for every parameter, even if it is zero. Nor
        does it under torch.fx or with hooks in that block, which see all of its features.
        """
        if self.training or not self.equivariant or self.append_abs_odd or is_fx_symbolic_tracing():
            return False
        return not has_hooks(*self.blocks[-1].modules())


def register_variants(module: str, baseline: str, variants: Iterable[str], create: Callable[..., nn.Module]) -> None:
    """Registers variants of a baseline in timm: "EH", "XEH" if timm does not have X, or `GROUP_VARIANTS`.

    `create(name, pretrained, **kwargs)` builds the model. If the caller does not pass `num_flop_blocks`, it stands for
    depth in E and depth // 2 in H.
    """
    for variant in variants:
        name = PREFIXES[variant] + baseline

        def entry_point(pretrained: bool = False, _name: str = name, **kwargs: Any) -> nn.Module:
            return create(_name, pretrained=pretrained, **kwargs)

        entry_point.__name__ = entry_point.__qualname__ = name
        entry_point.__module__ = module
        entry_point.__doc__ = f"{variant}(X) for X = {baseline}; keyword arguments go to the model."
        setattr(sys.modules[module], name, register_model(entry_point))


def resolve_num_flop_blocks(name: str, depth: int, num_flop_blocks: int | None) -> int:
    """The number of equivariant blocks. None selects no block of X, all blocks of E, and the first half of H.

    Raises: ValueError as `check_num_flop_blocks` does.
    """
    if num_flop_blocks is None:
        if name.startswith(PREFIXES["H"]):
            return depth // 2
        return depth if name.startswith(PREFIXES["E"]) else 0
    check_num_flop_blocks(num_flop_blocks, depth)
    return num_flop_blocks


def baseline_name(name: str) -> str:
    """The name of the baseline X of a model."""
    prefix = next((prefix for prefix in PREFIXES.values() if prefix and name.startswith(prefix)), "")
    return name.removeprefix(prefix)


def make_default_cfgs(
    sizes: Mapping[str, Mapping[str, Any]], variants: Iterable[str], first_conv: str
) -> dict[str, Any]:
    """timm's `default_cfgs` for models without published weights, with the paper's input and ImageNet's statistics.

    `first_conv` names the module of the patch embedding. Except in X its kernel has the symmetry of the group, with
    parameters named by irreps, such as `even` and `odd`, instead of timm's `weight`.
    """
    return generate_default_cfgs(
        {
            f"{PREFIXES[variant]}{name}.untrained": {
                "url": "",
                "num_classes": 1000,
                "input_size": (3, 224, 224),
                "pool_size": (224 // size.get("patch_size", 16),) * 2,
                "crop_pct": 1.0,
                "interpolation": "bicubic",
                "fixed_input_size": True,
                "mean": IMAGENET_DEFAULT_MEAN,
                "std": IMAGENET_DEFAULT_STD,
                "first_conv": first_conv,
                "classifier": "head",
                "license": "apache-2.0",
            }
            for name, size in sizes.items()
            for variant in variants
        }
    )
