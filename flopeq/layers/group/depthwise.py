"""The depthwise convolution that commutes with a group, computed in the group's regular basis."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from timm.layers.weight_init import trunc_normal_
from torch import Tensor, nn

from flopeq.backends.depthwise import depthwise_conv2d
from flopeq.groups import TRIVIAL, Group
from flopeq.layers.group.parts import describe_parts
from flopeq.square import Symmetry


@lru_cache
def symmetries_of_copies(group: Group) -> tuple[Symmetry, ...]:
    """The symmetry that takes the first of the |G| parts of the regular basis to each of them, in their order."""
    first = group.unrestrict(torch.eye(group.order, device="cpu")[:1], TRIVIAL)
    position = {group.restrict(group.act(g, first), TRIVIAL).argmax().item(): g for g in group.elements}
    return tuple(position[index] for index in range(group.order))


class GroupDepthwiseConv(nn.Module):
    """Depthwise convolution in the regular basis: y_h = (h k) * x_h + b for each symmetry h of the group.

    In the regular basis a symmetry g takes the part of h to the part of g h, and moves its positions. So each of the
    |G| parts meets the same kernel k, transformed by its symmetry, and the same bias. The layer changes to the regular
    basis before the convolution and back after it.

    For the flop this is not the layer of E(ConvNeXt), whose kernels are either symmetric or antisymmetric and need no
    change of basis (`FlopDepthwiseConv`, sec. 4.3). A kernel here has both parts, and the rows of a two-dimensional
    irrep need no kernels of their own.

    Shape: (B, C, H, W) -> (B, C, H, W).
    Cost: kernel_size^2 multiply-adds per channel and position, as for nn.Conv2d, and two changes of basis. It has
    1/|G| of the weights.
    Raises: ValueError if C is not a multiple of |G| or the kernel size is even.
    """

    def __init__(self, group: Group, num_channels: int, kernel_size: int = 7, device=None, dtype=None) -> None:
        super().__init__()
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size={kernel_size} has no middle position: use an odd size")
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        copies = group.multiplicity(num_channels, "num_channels")
        self.group, self.num_channels, self.kernel_size = group, num_channels, kernel_size
        self.weight = nn.Parameter(torch.empty(copies, 1, kernel_size, kernel_size, **dd))
        self.bias = nn.Parameter(torch.zeros(copies, **dd))
        self.symmetries = symmetries_of_copies(group)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initializes kernels as ConvNeXt does, from a truncated normal with std 0.02, and the bias with zeros."""
        trunc_normal_(self.weight, std=0.02)
        nn.init.zeros_(self.bias)

    def kernel(self) -> Tensor:
        """The kernels of all parts in the regular basis, (C, 1, kernel_size, kernel_size)."""
        return torch.cat([g(self.weight) for g in self.symmetries])

    def forward(self, x: Tensor) -> Tensor:
        # Features are in channels-last layout, which is how the block's norm and linear layers read them.
        x = torch.cat(self.group.to_regular(self.group.split(x.permute(0, 2, 3, 1))), -1).permute(0, 3, 1, 2)
        bias = self.bias.repeat(self.group.order)
        y = depthwise_conv2d(x, self.kernel(), bias, self.kernel_size // 2, self.num_channels)
        y = y.permute(0, 2, 3, 1)
        copies = self.num_channels // self.group.order
        # Slices, because torch.fx cannot iterate over the result of `chunk`.
        regular = [y[..., index * copies : (index + 1) * copies] for index in range(self.group.order)]
        return self.group.join(self.group.from_regular(regular)).permute(0, 3, 1, 2)

    def extra_repr(self) -> str:
        return f"{describe_parts(self.group, self.num_channels)}, kernel_size={self.kernel_size}"
