"""Layers that see positions: attention, patches and position embeddings commute with the group, and equal twins."""

import pytest
import torch
import torch.nn.functional as F
from timm.layers.attention import Attention
from timm.models import adapt_input_conv
from torch import Tensor, nn

from flopeq.groups import C2, C2XC2, D4, Group
from flopeq.layers import FlopAttention, FlopPatchConv, FlopPatchEmbed, FlopPosEmbed
from flopeq.layers.group import GroupAttention, GroupPatchConv, GroupPatchEmbed, GroupPosEmbed, orbit_table
from flopeq.square import IDENTITY, Symmetry
from flopeq.testing import relative_error
from tests.layers.test_group_layers import drawn, features, groups

SIZES = [(4, 4), (5, 5), (1, 1), (2, 3), (3, 4)]

ALL = [(group, size) for group in (C2, C2XC2, D4) for size in SIZES if size[0] == size[1] or not group.transposes]

each_size = pytest.mark.parametrize(("group", "size"), ALL, ids=str)


def act_on_tokens(group: Group, g: Symmetry, x_BNC: Tensor, grid: tuple[int, int]) -> Tensor:
    x_BCHW = x_BNC.unflatten(1, grid).movedim(-1, 1)
    return group.act_on_grid(g, x_BCHW).flatten(2).mT


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("normed", [True, False])
@groups
def test_attention_commutes_and_takes_parts(group: Group, normed: bool, fused: bool) -> None:
    layer = drawn(GroupAttention(group, 32, 2, qkv_bias=True, qk_norm=normed, scale_norm=normed))
    layer.fused_attn = fused
    x, grid = features(2, 9, 32), (3, 3)
    y = layer(x)
    for g in group.elements:
        assert relative_error(layer(act_on_tokens(group, g, x, grid)), act_on_tokens(group, g, y, grid)) < 1e-10
        assert g == IDENTITY or relative_error(act_on_tokens(group, g, y, grid), y) > 1e-3
    torch.testing.assert_close(group.join(layer(group.split(x))), y)


def head_order(group: Group, dim: int, heads: int) -> Tensor:
    """The channels of each head, one head after the other."""
    channels = group.split(torch.arange(dim))
    rows = [row for part in channels for row in (part if part.ndim == 2 else part[None])]
    return torch.cat([row.chunk(heads)[head] for head in range(heads) for row in rows])


@groups
def test_attention_equals_timms_on_the_dense_weights(group: Group) -> None:
    dim, heads = 32, 2
    layer = drawn(GroupAttention(group, dim, heads, qkv_bias=True))
    dense = Attention(dim, heads, qkv_bias=True).double().eval()
    order = head_order(group, dim, heads)

    def matrix(linear: nn.Module, third: int = 0, thirds: int = 1) -> Tensor:
        blocks = []
        for irrep in group.irreps:
            blocks += [linear.get_submodule(irrep.name).weight.chunk(thirds)[third]] * irrep.dim
        return torch.block_diag(*blocks)

    with torch.no_grad():
        dense.qkv.weight.copy_(torch.cat([matrix(layer.qkv, third, 3)[order] for third in range(3)]))
        biases = layer.qkv.get_submodule(group.irreps[0].name).bias.chunk(3)
        dense.qkv.bias.copy_(torch.cat([F.pad(bias, (0, dim - len(bias)))[order] for bias in biases]))
        dense.proj.weight.copy_(matrix(layer.proj)[:, order])
        bias = layer.proj.get_submodule(group.irreps[0].name).bias
        dense.proj.bias.copy_(F.pad(bias, (0, dim - len(bias))))
    x = features(2, 6, dim)
    torch.testing.assert_close(layer(x), dense(x))


@each_size
def test_fields_have_as_many_free_values_as_the_grid_has_entries(group: Group, size: tuple[int, int]) -> None:
    free = {irrep.name: len(orbit_table(group, irrep, size).representatives) for irrep in group.irreps}
    assert sum(irrep.dim * free[irrep.name] for irrep in group.irreps) == size[0] * size[1]
    if group is D4 and size == (5, 5):
        assert free == {"a1": 6, "a2": 1, "b1": 3, "b2": 3, "e": 6}


def test_the_second_row_of_e_is_the_first_transposed() -> None:
    kernel = drawn(GroupPatchConv(D4, 3, 16, 5)).kernel()
    first, second = kernel[8:].chunk(2)
    torch.testing.assert_close(second, first.mT)
    torch.testing.assert_close(first.flip(-1), -first)
    torch.testing.assert_close(first.flip(-2), first)
    assert first.abs().max() > 0.1


@each_size
def test_patch_convolution_commutes(group: Group, size: tuple[int, int]) -> None:
    layer = drawn(GroupPatchConv(group, 2, 16, size, scale=0.5))
    image = features(2, 2, 3 * size[0], 3 * size[1])
    y = layer(image)
    for g in group.elements:
        assert relative_error(layer(g(image)), group.act_on_grid(g, y)) < 1e-10
    assert relative_error(layer(group.mirrors[0](image)), y) > 1e-3
    # On one pixel only the trivial irrep has a kernel.
    weights = sum(p.numel() for p in layer.parameters()) - 16 // group.order
    assert weights == 2 * 16 * size[0] * size[1] // group.order


@each_size
def test_position_embedding_is_symmetric_and_stays_so_when_resized(group: Group, size: tuple[int, int]) -> None:
    embed = drawn(GroupPosEmbed(group, size, 16))
    assert embed().shape == (1, size[0] * size[1], 16)
    for g in group.elements:
        torch.testing.assert_close(act_on_tokens(group, g, embed(), size), embed())
    for other in ((6, 6), (3, 3)):
        resized = embed.resized(other)
        assert resized.grid_size == other
        for g in group.elements:
            torch.testing.assert_close(act_on_tokens(group, g, resized(), other), resized())
        torch.testing.assert_close(resized(), embed(other), atol=1e-6, rtol=1e-5)  # timm resamples in float32


@pytest.mark.parametrize("size", [(4, 4), (5, 5), (2, 3), (1, 1)])
@pytest.mark.parametrize(
    ("ours", "flops"),
    [
        (lambda size: GroupAttention(C2, 16, 2, qkv_bias=True, qk_norm=True),
         lambda size: FlopAttention(16, 2, qkv_bias=True, qk_norm=True)),
        (lambda size: GroupPatchConv(C2, 3, 8, size, scale=0.5), lambda size: FlopPatchConv(3, 8, size, scale=0.5)),
        (lambda size: GroupPosEmbed(C2, size, 8), lambda size: FlopPosEmbed(size, 8)),
    ],
    ids=["attention", "patches", "positions"],
)  # fmt: skip
def test_with_c2_a_layer_equals_the_flops_on_the_same_state_dict(ours, flops, size: tuple[int, int]) -> None:
    theirs, layer = drawn(flops(size)), ours(size).double().eval()
    assert sorted(layer.state_dict()) == sorted(theirs.state_dict())
    state_dict = theirs.state_dict()
    shapes = {name: value.shape for name, value in state_dict.items()}
    layer.load_state_dict(state_dict)
    assert {name: value.shape for name, value in state_dict.items()} == shapes, "the given state dict stays as it is"
    x = {"GroupAttention": (features(2, 5, 16),), "GroupPosEmbed": ()}.get(
        type(layer).__name__, (features(2, 3, 2 * size[0], 2 * size[1]),)
    )
    torch.testing.assert_close(layer(*x), theirs(*x), atol=1e-12, rtol=1e-12)


@groups
@pytest.mark.parametrize("patch_size", [2, 3])
def test_a_patch_embedding_can_change_its_sizes(group: Group, patch_size: int) -> None:
    embed = drawn(GroupPatchEmbed(group, 12, 4, 3, 16, flatten=False))
    embed.set_input_size(18, patch_size)
    image = features(2, 3, 18, 18)
    y = embed(image)
    assert y.shape == (2, 16, 18 // patch_size, 18 // patch_size)
    for g in group.elements:
        assert relative_error(embed(g(image)), group.act_on_grid(g, y)) < 1e-6  # timm resamples in float32


def test_c2_resamples_as_the_flop_does() -> None:
    ours, theirs = GroupPatchEmbed(C2, 12, 4, 3, 16).double(), drawn(FlopPatchEmbed(12, 4, 3, 16))
    ours.load_state_dict(theirs.state_dict())
    for embed in (ours, theirs):
        embed.set_input_size((18, 12), (3, 2))
    x = features(2, 3, 18, 12)
    torch.testing.assert_close(ours(x), theirs(x))


@groups
@pytest.mark.parametrize("in_chans", [1, 4])
def test_kernels_of_other_input_channels_are_adapted(group: Group, in_chans: int, caplog) -> None:
    source, layer = drawn(GroupPatchConv(group, 3, 16, 4)), GroupPatchConv(group, in_chans, 16, 4).double()
    layer.load_state_dict(source.state_dict())
    assert f"{group.irreps[0].name} from 3 to {in_chans} input channels" in caplog.text
    expected = adapt_input_conv(in_chans, source.kernel())
    torch.testing.assert_close(layer.kernel(), expected, atol=1e-6, rtol=1e-6)  # timm adapts in float32


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GroupAttention(D4, 32, 8), "8 heads 8 equal parts.*multiple of 64"),
        (lambda: GroupPatchConv(D4, 3, 16, (4, 2)), "patch_size 4 x 2 is not square: d4"),
        (lambda: GroupPatchConv(D4, 3, 12, 4), "embed_dim is 12"),
        (lambda: GroupPosEmbed(D4, (4, 3), 16), "grid 4 x 3 is not square: d4"),
        (lambda: GroupPosEmbed(D4, (4, 4), 16).resized((4, 2)), "grid 4 x 2 is not square"),
        (lambda: GroupPatchEmbed(D4, (8, 12), 4, 3, 16), "image size 8 x 12 is not square"),
        (lambda: GroupPatchEmbed(D4, 8, 4, 3, 16).set_input_size((8, 12)), "image size 8 x 12 is not square"),
        (lambda: GroupPatchEmbed(C2XC2, (10, 8), 4, 3, 16), "height 10 is not a multiple of the patch height 4"),
        (lambda: GroupPatchEmbed(C2XC2, (8, 10), 4, 3, 16), "width 10 is not a multiple"),
        (lambda: GroupPatchEmbed(D4, 8, 4, 3, 16, dynamic_img_pad=True), "dynamic_img_pad"),
        (lambda: GroupPatchConv(D4, 3, 16, 4)(torch.zeros(1, 3, 8, 12)), "image size 8 x 12 is not square"),
        (lambda: GroupAttention(D4, 32, 2)(torch.zeros(1, 3, 32), is_causal=True), "causal"),
    ],
)
def test_what_the_group_cannot_act_on_is_refused(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_only_the_flop_takes_any_height() -> None:
    assert GroupPatchConv(C2, 3, 16, 4)(torch.zeros(1, 3, 10, 8)).shape == (1, 16, 2, 2)


@groups
def test_tables_survive_the_meta_device(group: Group) -> None:
    with torch.device("meta"):
        layer = GroupPatchConv(group, 3, 16, 4)
    layer.to_empty(device="cpu")
    layer.init_weights()
    image = torch.randn(1, 3, 8, 8)
    g = group.mirrors[-1]
    torch.testing.assert_close(layer(g(image)), group.act_on_grid(g, layer(image)), atol=1e-5, rtol=1e-5)
