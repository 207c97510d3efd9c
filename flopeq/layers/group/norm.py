"""Layer norm with one scale that all parts share, and LayerScale."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flopeq.groups import Group, Parts
from flopeq.layers.group.parts import describe_parts, from_parts, multiplicities, split_scales, to_parts


class GroupLayerNorm(nn.Module):
    """y = w * (x - mean of its part) / sqrt((sum_i d_i^2 var_i + eps) / |G|), plus a bias on the first part.

    The layer subtracts the mean of each part, and of each row of a two-dimensional part, over its channels. All parts
    share one scale, which no symmetry changes: the mean square of all C channels. `var_i` is the mean square of a part
    of dimension d_i. As in `FlopLayerNorm`, eps is added before the division, so its effect is eps/|G|.

    octic-vits counts every part once, the two-dimensional one too (`squared_dims=False`). Features of equal variance
    then come out with a variance of 1.6.

    Shape: (..., C) -> (..., C); a tuple of parts gives a tuple. Statistics are computed in float32 or higher precision.
    The rows of a two-dimensional part share their weights.
    Raises: ValueError if C is not a multiple of |G|.
    """

    def __init__(
        self, group: Group, num_channels: int, eps: float = 1e-6, squared_dims: bool = True, device=None, dtype=None
    ) -> None:
        super().__init__()
        self.group, self.num_channels, self.eps, self.squared_dims = group, num_channels, eps, squared_dims
        widths = multiplicities(group, num_channels, "num_channels")
        self.weight = nn.Parameter(torch.ones(sum(widths), device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(widths[0], device=device, dtype=dtype))

    def reset_parameters(self) -> None:
        """Sets the weight to 1 and the bias to 0."""
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor | Parts) -> Tensor | Parts:
        parts = to_parts(self.group, x)
        dtype = parts[0].dtype
        wide = [part.to(torch.promote_types(dtype, torch.float32)) for part in parts]
        centred = [part - part.mean(-1, keepdim=True) for part in wide]
        variances = []
        for irrep, part in zip(self.group.irreps, centred, strict=True):
            variance = part.square().mean(-1, keepdim=True)
            if irrep.dim > 1:
                variance = variance.mean(-2) * (irrep.dim**2 if self.squared_dims else 1)
            variances.append(variance)
        scale = 1 / (self.group.order**-0.5 * torch.sqrt(sum(variances[1:], variances[0]) + self.eps))
        normed = []
        for irrep, part, weight in zip(self.group.irreps, centred, split_scales(self.group, self.weight), strict=True):
            y = part * (scale if irrep.dim == 1 else scale[..., None]) * weight
            normed.append((y if normed else y + self.bias).to(dtype))
        return from_parts(self.group, tuple(normed), like=x)

    def extra_repr(self) -> str:
        octic = "" if self.squared_dims else ", squared_dims=False"
        return f"{describe_parts(self.group, self.num_channels)}, eps={self.eps}{octic}"


class GroupLayerScale(nn.Module):
    """LayerScale, y = gamma * x, with one scale for both rows of a two-dimensional part.

    Shape: (..., C) -> (..., C); a tuple of parts gives a tuple.
    Raises: ValueError if C is not a multiple of |G|.
    """

    def __init__(self, group: Group, num_channels: int, init_values: float = 1e-5, device=None, dtype=None) -> None:
        super().__init__()
        self.group, self.num_channels, self.init_values = group, num_channels, init_values
        widths = multiplicities(group, num_channels, "num_channels")
        self.gamma = nn.Parameter(torch.empty(sum(widths), device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Sets all scales to their initial value."""
        nn.init.constant_(self.gamma, self.init_values)

    def forward(self, x: Tensor | Parts) -> Tensor | Parts:
        scales = split_scales(self.group, self.gamma)
        scaled = tuple(gamma * part for gamma, part in zip(scales, to_parts(self.group, x), strict=True))
        return from_parts(self.group, scaled, like=x)

    def extra_repr(self) -> str:
        return describe_parts(self.group, self.num_channels)
