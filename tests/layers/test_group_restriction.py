"""Restriction: layers of a larger group are layers of its subgroups, after a fixed orthogonal change of channels.

Linear layers, activations and attention are; see Ong and Bokman 2026, theorem 2. Norms and LayerScale are not, because
they act irrep by irrep.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from flopeq.groups import C2, C2XC2, D4, Group
from flopeq.irreps import split
from flopeq.layers import FlopAttention, FlopGELU, FlopLayerNorm, FlopLinear
from flopeq.layers.group import GroupAttention, GroupGELU, GroupLayerNorm, GroupLinear
from flopeq.models.group_vit import GroupBlock
from flopeq.models.vit import FLOP_LAYERS, FlopBlock
from tests.layers.test_group_grids import head_order
from tests.layers.test_group_layers import drawn, features

larger = pytest.mark.parametrize("group", [C2XC2, D4], ids=lambda group: group.name)


def matrix(function: Callable[[Tensor], Tensor], width: int) -> Tensor:
    """The matrix of a linear function of the last axis."""
    zero = function(torch.zeros(width, dtype=torch.float64))
    return (function(torch.eye(width, dtype=torch.float64)) - zero).T


def copy_blocks(layer: FlopLinear, weight: Tensor, bias: Tensor) -> None:
    """Copies a dense map of vectors, even then odd, whose blocks between even and odd are zero."""
    outer, inner = (size // 2 for size in weight.shape)
    torch.testing.assert_close(weight[:outer, inner:], torch.zeros_like(weight[:outer, inner:]))
    torch.testing.assert_close(weight[outer:, :inner], torch.zeros_like(weight[outer:, :inner]))
    torch.testing.assert_close(bias[outer:], torch.zeros_like(bias[outer:]))
    with torch.no_grad():
        layer.even.weight.copy_(weight[:outer, :inner])
        layer.odd.weight.copy_(weight[outer:, inner:])
        layer.even.bias.copy_(bias[:outer])


@larger
def test_a_linear_layer_is_one_of_the_flop(group: Group) -> None:
    layer, flops, x = drawn(GroupLinear(group, 16, 32)), FlopLinear(16, 32).double(), features(3, 16)
    weight = matrix(lambda x: group.restrict(layer(group.unrestrict(x, C2)), C2), 16)
    copy_blocks(flops, weight, group.restrict(layer(torch.zeros(16, dtype=torch.float64)), C2))
    torch.testing.assert_close(flops(group.restrict(x, C2)), group.restrict(layer(x), C2))


@larger
def test_gelu_is_that_of_the_flop(group: Group) -> None:
    x = features(3, 16)
    torch.testing.assert_close(FlopGELU()(group.restrict(x, C2)), group.restrict(GroupGELU(group)(x), C2))


@larger
def test_attention_is_one_of_the_flop(group: Group) -> None:
    dim, heads = 32, 2
    layer, flops = drawn(GroupAttention(group, dim, heads, qkv_bias=True)), FlopAttention(dim, heads, qkv_bias=True)
    flops = flops.double()
    order = head_order(group, dim, heads)

    def restrict_heads(x: Tensor) -> Tensor:
        """Restricts each head by itself: the even parts of all heads, then the odd parts."""
        even, odd = split(group.restrict(x[..., order].unflatten(-1, (heads, -1)), C2))
        return torch.cat((even.flatten(-2), odd.flatten(-2)), -1)

    def third(x: Tensor, number: int) -> Tensor:
        """Queries, keys or values, restricted head by head."""
        parts = group.split(layer.qkv(x))
        return restrict_heads(group.join(tuple(part.chunk(3, -1)[number] for part in parts)))

    weights = [matrix(lambda x, n=n: third(group.unrestrict(x, C2), n), dim) for n in range(3)]
    biases = [third(torch.zeros(dim, dtype=torch.float64), n) for n in range(3)]

    def thirds_by_parity(tensors: list[Tensor]) -> Tensor:
        return torch.cat([split(tensor, 0)[parity] for parity in (0, 1) for tensor in tensors])

    copy_blocks(flops.qkv, thirds_by_parity(weights), thirds_by_parity(biases))
    from_heads = matrix(restrict_heads, dim).T  # orthogonal
    weight = matrix(lambda x: group.restrict(layer.proj(x @ from_heads.T), C2), dim)
    copy_blocks(flops.proj, weight, group.restrict(layer.proj(torch.zeros(dim, dtype=torch.float64)), C2))
    x = features(2, 5, dim)
    torch.testing.assert_close(flops(group.restrict(x, C2)), group.restrict(layer(x), C2))


@larger
def test_a_norm_is_not_one_of_the_flop(group: Group) -> None:
    """Its mean is that of each irrep, and its eps is shared by more parts."""
    x = features(3, 16) + 1
    ours = group.restrict(GroupLayerNorm(group, 16).double()(x), C2)
    assert (ours - FlopLayerNorm(16).double()(group.restrict(x, C2))).abs().max() > 0.01


def test_a_block_of_c2_equals_the_flops_on_the_same_state_dict() -> None:
    args = {"num_heads": 2, "qkv_bias": True, "init_values": 0.5, "qk_norm": True, "scale_mlp_norm": True}
    flops, ours = drawn(FlopBlock(16, **args, **FLOP_LAYERS)), GroupBlock(C2, 16, **args).double()
    ours.load_state_dict(flops.state_dict())
    x = features(2, 6, 16)
    torch.testing.assert_close(ours(x), flops(x), atol=1e-12, rtol=1e-12)


def test_the_twin_with_a_swapped_sign_is_not_equal() -> None:
    """The equalities above can fail: with the last part negated, GELU is not that of the flop."""
    x = features(3, 16)
    negated = D4.join((*D4.split(x)[:-1], -D4.split(x)[-1].flip(-2)))
    found = FlopGELU()(D4.restrict(negated, C2))
    assert (found - D4.restrict(GroupGELU(D4)(x), C2)).abs().max() > 0.01
