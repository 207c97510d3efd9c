"""Checks that a model commutes with the flop or a larger group, by its logits and by the features of every block."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from flopeq.groups import C2, GROUPS, TRIVIAL, Group
from flopeq.square import IDENTITY, Symmetry, symmetry_group


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Largest absolute difference over the largest absolute value expected; nan if either is not finite."""
    return ((found - expected).abs().max() / expected.abs().max().clamp_min(torch.finfo(expected.dtype).tiny)).item()


def equivariance_error(model: nn.Module, images: Tensor, group: str | Iterable[Symmetry] = "flop") -> float:
    """max |f(g x) - f(x)| / max |f(x)| for the logits f: zero, to rounding, for an invariant classifier.

    The largest of all symmetries g of `group`: c2, c2xc2 or d4, or what `flopeq.square.symmetry_group` takes. The
    function does not change the mode of the model: call `model.eval()` first. `images` is (B, C, H, W), with the dtype
    and device of the model.
    Raises: ValueError if the group transposes and the images are not square.
    """
    return largest_error(_logit_errors(model, images, group).values())


def block_errors(model: nn.Module, images: Tensor, group: str | Iterable[Symmetry] = "flop") -> dict[str, float]:
    """The same for the features h of each block: max |h(g x) - g h(x)| / max |h(x)|.

    Features of an equivariant block carry irreps. Of a block with a smaller group than the first block's, they are
    restricted features, and those of a hybrid's ordinary blocks are in the regular basis: then nothing is promised for
    the symmetries that were given up. Only symmetries of the first block's group are tried. A model that declares no
    feature types (X) gives no entries.
    Raises: ValueError as `equivariance_error` does.
    """
    return {name: largest_error(errors.values()) for name, errors in _block_errors(model, images, group).items()}


def errors_by_symmetry(
    model: nn.Module, images: Tensor, group: str | Iterable[Symmetry] = "flop"
) -> dict[str, dict[Symmetry, float]]:
    """The errors of each block and of the logits under each symmetry of a group but the identity.

    The keys are those of `block_errors`, and `logits`. Blocks have no entry for a symmetry that is not tried on them.
    Raises: ValueError as `equivariance_error` does.
    """
    return _block_errors(model, images, group) | {"logits": _logit_errors(model, images, group)}


def assert_equivariant(
    model: nn.Module, images: Tensor, tol: float = 1e-10, group: str | Iterable[Symmetry] = "flop"
) -> None:
    """Raises AssertionError, naming the first block that breaks the law, unless logits and blocks keep it to `tol`.

    1e-10 suits float64; use about 1e-4 in float32. Ordinary blocks of a hybrid, and hence its logits, break it. So do
    blocks of a smaller group than `group`.
    """
    errors = errors_by_symmetry(model, images, group)
    checks = [(name, g, error) for name, by_symmetry in errors.items() for g, error in by_symmetry.items()]
    broken = [check for check in checks if not check[2] <= tol]
    if broken:
        name, g, error = broken[0]
        raise AssertionError(
            f"{type(model).__name__} does not commute with the {g}: {name} is off by {error:.2e} relative "
            f"(tolerance {tol:.0e}); {len(broken)} of {len(checks)} checks failed"
        )


def feature_groups(model: nn.Module) -> list[Group]:
    """The group of each block's features; the trivial one for the regular basis. Empty for X."""
    num_flop_blocks = getattr(model, "num_flop_blocks", 0)
    if num_flop_blocks:
        blocks = model.get_submodule("blocks")
        assert isinstance(blocks, nn.Sequential)
        return [C2 if index < num_flop_blocks else TRIVIAL for index in range(len(blocks))]
    return list(getattr(model, "block_groups", ()))


def network_group(model: nn.Module) -> Group:
    """The group of the first block's features, which is the largest that the network has. The trivial one for X."""
    return next(iter(feature_groups(model)), TRIVIAL)


def logit_group(model: nn.Module) -> Group:
    """The group under which the logits are invariant by construction: the trivial one for X and most hybrids."""
    groups = feature_groups(model)
    return getattr(model, "logit_group", groups[-1] if groups else TRIVIAL)


@torch.no_grad()
def _logit_errors(model: nn.Module, images: Tensor, group: str | Iterable[Symmetry]) -> dict[Symmetry, float]:
    logits = model(images)
    return {g: relative_error(model(g(images)), logits) for g in _symmetries(group, images)}


@torch.no_grad()
def _block_errors(
    model: nn.Module, images: Tensor, group: str | Iterable[Symmetry]
) -> dict[str, dict[Symmetry, float]]:
    groups = feature_groups(model)
    if not groups:
        return {}
    features = model.forward_intermediates(images, intermediates_only=True)  # pyright: ignore[reportCallIssue]
    errors: dict[str, dict[Symmetry, float]] = {f"blocks.{index}": {} for index in range(len(features))}
    for g in _symmetries(group, images):
        if g not in groups[0].elements:
            continue
        of_g = model.forward_intermediates(g(images), intermediates_only=True)  # pyright: ignore[reportCallIssue]
        for index, (feature, found) in enumerate(zip(features, of_g, strict=True)):
            expected = groups[0].act_on_grid(g, feature, restricted_to=groups[index])
            errors[f"blocks.{index}"][g] = relative_error(found, expected)
    return errors


def _symmetries(group: str | Iterable[Symmetry], images: Tensor) -> list[Symmetry]:
    """All but the identity."""
    elements = GROUPS[group].elements if isinstance(group, str) and group in GROUPS else symmetry_group(group)
    if images.shape[-1] != images.shape[-2] and any(g.swaps_axes for g in elements):
        raise ValueError(
            f"images of {images.shape[-2]} x {images.shape[-1]} pixels are not square: a quarter turn gives images of "
            "another shape"
        )
    return [g for g in elements if g != IDENTITY]


def largest_error(errors: Iterable[float]) -> float:
    """The largest of some errors; nan if one of them is, and 0 if there are none."""
    return torch.tensor([0.0, *errors], dtype=torch.float64).amax().item()
