"""Checks that a model commutes with the flop, by its logits and by the features of every block."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flopeq.irreps import flop_grid, flop_regular_grid


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Largest absolute difference over the largest absolute value expected; nan if either is not finite."""
    return ((found - expected).abs().max() / expected.abs().max().clamp_min(torch.finfo(expected.dtype).tiny)).item()


@torch.no_grad()
def equivariance_error(model: nn.Module, images: Tensor) -> float:
    """max |f(flop x) - f(x)| / max |f(x)| for the logits f: zero, to rounding, for an invariant classifier.

    The function does not change the mode of the model: call `model.eval()` first. `images` is (B, C, H, W), with the
    dtype and device of the model.
    """
    return relative_error(model(images.flip(-1)), model(images))


@torch.no_grad()
def block_errors(model: nn.Module, images: Tensor) -> dict[str, float]:
    """The same for the features g of each block: max |g(flop x) - flop g(x)| / max |g(x)|.

    Features of an equivariant block carry irreps, those of a hybrid's ordinary blocks the regular basis, for which
    nothing is promised. A model that declares no feature types (X) gives no entries.
    """
    num_flop_blocks = getattr(model, "num_flop_blocks", 0)
    if not num_flop_blocks:
        return {}
    features = model.forward_intermediates(images, intermediates_only=True)  # pyright: ignore[reportCallIssue]
    of_flop = model.forward_intermediates(images.flip(-1), intermediates_only=True)  # pyright: ignore[reportCallIssue]
    return {
        f"blocks.{index}": relative_error(found, (flop_grid if index < num_flop_blocks else flop_regular_grid)(feature))
        for index, (feature, found) in enumerate(zip(features, of_flop, strict=True))
    }


def assert_equivariant(model: nn.Module, images: Tensor, tol: float = 1e-10) -> None:
    """Raises AssertionError, naming the first block that breaks the law, unless logits and blocks keep it to `tol`.

    1e-10 suits float64; use about 1e-4 in float32. Ordinary blocks of a hybrid, and hence its logits, break it.
    """
    errors = block_errors(model, images) | {"logits": equivariance_error(model, images)}
    broken = {name: error for name, error in errors.items() if not error <= tol}
    if broken:
        name, error = next(iter(broken.items()))
        raise AssertionError(
            f"{type(model).__name__} does not commute with the flop: {name} is off by {error:.2e} relative "
            f"(tolerance {tol:.0e}); {len(broken)} of {len(errors)} checks failed"
        )
