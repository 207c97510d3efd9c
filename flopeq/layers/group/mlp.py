"""The activation in the regular basis of a group, and the MLP that uses it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flopeq.groups import Group, Parts
from flopeq.layers.group.linear import GroupLinear
from flopeq.layers.group.norm import GroupLayerNorm
from flopeq.layers.group.parts import from_parts, to_parts
from flopeq.layers.halves import call_unless_identity


class GroupGELU(nn.Module):
    """GELU in the regular basis, where a symmetry permutes features: change basis, apply GELU, change back.

    Shape: (..., C) -> (..., C); a tuple of parts gives a tuple.
    Cost: log2 |G| additions and products per value for each change of basis (fewer for D4's two-dimensional part).
    """

    def __init__(self, group: Group) -> None:
        super().__init__()
        self.group = group

    def forward(self, x: Tensor | Parts) -> Tensor | Parts:
        regular = [F.gelu(part) for part in self.group.to_regular(to_parts(self.group, x))]
        if any(irrep.dim > 1 for irrep in self.group.irreps):
            # Parts of two widths compile into two loops. Without one tensor between them, both compute every GELU.
            copies, joined = regular[0].shape[-1], torch.cat(regular, -1)
            regular = [joined[..., index * copies : (index + 1) * copies] for index in range(self.group.order)]
        return from_parts(self.group, self.group.from_regular(regular), like=x)

    def extra_repr(self) -> str:
        return self.group.name


class GroupMlp(nn.Module):
    """Two equivariant linear maps with an equivariant activation between them, as in timm's `Mlp`.

    Shape: (..., in_features) -> (..., out_features); a tuple of parts gives a tuple.
    Cost: that of its two `GroupLinear`s.
    """

    def __init__(
        self,
        group: Group,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        act_layer: Callable[[], nn.Module] | None = None,
        norm_layer: Callable[..., GroupLayerNorm] | None = None,
        bias: bool = True,
        drop: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        hidden_features = hidden_features or in_features
        self.group = group
        self.fc1 = GroupLinear(group, in_features, hidden_features, bias=bias, **dd)
        self.act = (act_layer or partial(GroupGELU, group))()
        self.drop1 = nn.Dropout(drop)
        self.norm = norm_layer(hidden_features, **dd) if norm_layer else nn.Identity()
        self.fc2 = GroupLinear(group, hidden_features, out_features or in_features, bias=bias, **dd)
        self.drop2 = nn.Dropout(drop)

    def forward(self, x: Tensor | Parts) -> Tensor | Parts:
        parts = self.act(self.fc1(to_parts(self.group, x)))
        parts = call_unless_identity(self.norm, tuple(self.drop1(part) for part in parts))
        parts = tuple(self.drop2(part) for part in self.fc2(parts))
        return from_parts(self.group, parts, like=x)
