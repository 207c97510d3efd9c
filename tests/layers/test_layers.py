"""Each layer commutes with the flop, is not trivially symmetric, and equals a slow reference implementation."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers import Mlp
from timm.layers.activations import quick_gelu
from timm.layers.attention import Attention
from timm.models.convnext import ConvNeXtBlock
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from flopeq.irreps import change_basis, flop, flop_grid, half, join, split
from flopeq.layers.attention import FlopAttention
from flopeq.layers.biparity import (
    BiparityAffine,
    BiparityLinear,
    BiparityMlp,
    ColumnParity,
    FlopResBlock,
    ParityParts,
    TokenMixing,
    apply_with_and_without_bias,
)
from flopeq.layers.conv import FlopDepthwiseConv, FlopPatchConv, mirror_kernel
from flopeq.layers.embed import FlopPatchEmbed, FlopPosEmbed
from flopeq.layers.linear import FlopLinear
from flopeq.layers.mlp import FlopGELU, FlopMlp
from flopeq.layers.norm import FlopLayerNorm, FlopLayerScale
from flopeq.models.convnext import FlopConvNeXtBlock
from flopeq.models.vit import _make_block
from flopeq.testing import relative_error
from tests.models.conftest import randomize_parameters

quarters = st.integers(1, 4)

grids = st.tuples(st.integers(1, 4), st.integers(1, 5))

few = settings(max_examples=20, deadline=None)


def drawn(layer: nn.Module) -> nn.Module:
    return randomize_parameters(layer.double().eval())


def features(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def flop_tokens(x_BNC: Tensor, grid: tuple[int, int]) -> Tensor:
    """The group's action on tokens in raster order."""
    return flop(x_BNC.unflatten(1, grid).flip(2).flatten(1, 2))


def flop_parts(x: ParityParts) -> ParityParts:
    """The group's action on features by parity: a feature changes sign if its two parities differ."""
    return ParityParts(x.ee, -x.eo, -x.oe, x.oo)


def assert_commutes(layer: nn.Module, x: Tensor, action, action_out=None) -> None:
    action_out = action_out or action
    y = layer(x)
    assert relative_error(layer(action(x)), action_out(y)) < 1e-10
    assert relative_error(layer(action(x)), y) > 1e-3, "the law would be vacuous"


@few
@given(quarters, quarters)
def test_linear_commutes_and_equals_its_dense_twin(inner: int, outer: int) -> None:
    layer = drawn(FlopLinear(2 * inner, 2 * outer))
    x = features(3, 2 * inner)
    assert_commutes(layer, x, flop)
    dense = torch.block_diag(layer.even.weight, layer.odd.weight)
    bias = F.pad(layer.even.bias, (0, outer))
    torch.testing.assert_close(layer(x), F.linear(x, dense, bias))


def test_a_constant_odd_bias_breaks_the_flop(monkeypatch) -> None:
    layer = drawn(FlopLinear(4, 4))
    layer.odd.bias = nn.Parameter(torch.ones(2, dtype=torch.float64))
    x = features(3, 4)
    with pytest.raises(ValueError, match="odd features has a bias, 'bias'"):
        layer(x)
    monkeypatch.setattr("flopeq.layers.linear.check_no_bias", lambda odd: None)
    assert relative_error(layer(flop(x)), flop(layer(x))) > 1e-3


@few
@given(st.integers(1, 6))
def test_layer_norm_commutes_and_equals_its_formula(channels: int) -> None:
    layer = drawn(FlopLayerNorm(4 * channels, eps=1e-3))
    x = features(3, 5, 4 * channels)
    assert_commutes(layer, x, flop)
    even, odd = split(x)
    variance = (even.var(-1, correction=0) + odd.var(-1, correction=0)) / 2 + 1e-3 / 2
    centred = join(even - even.mean(-1, keepdim=True), odd - odd.mean(-1, keepdim=True))
    expected = centred / variance.sqrt()[..., None] * layer.weight + F.pad(layer.bias, (0, 2 * channels))
    torch.testing.assert_close(layer(x), expected)


def test_layer_norm_takes_statistics_in_float32() -> None:
    layer = FlopLayerNorm(64)
    x = 300 + torch.randn(4, 64)
    y = layer(x.bfloat16())
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), layer(x.bfloat16().float()), atol=0.02, rtol=0.01)


@few
@given(quarters)
def test_gelu_commutes_and_acts_in_the_regular_basis(channels: int) -> None:
    x = features(3, 2 * channels)
    assert_commutes(FlopGELU(), x, flop)
    torch.testing.assert_close(change_basis(FlopGELU()(x)), F.gelu(change_basis(x)))


def test_gelu_of_irreps_themselves_breaks_the_flop() -> None:
    x = features(3, 8)
    assert relative_error(F.gelu(flop(x)), flop(F.gelu(x))) > 1e-3


@few
@given(quarters, st.booleans())
def test_mlp_commutes(channels: int, normed: bool) -> None:
    layer = drawn(FlopMlp(4 * channels, 8 * channels, norm_layer=FlopLayerNorm if normed else None))
    assert_commutes(layer, features(3, 4 * channels), flop)


@few
@given(grids, st.integers(1, 3), st.booleans(), st.booleans())
def test_attention_commutes_fused_or_not(grid: tuple[int, int], heads: int, fused: bool, normed: bool) -> None:
    layer = drawn(FlopAttention(8 * heads, heads, qkv_bias=True, qk_norm=normed, scale_norm=normed))
    layer.fused_attn = fused
    x = features(2, grid[0] * grid[1], 8 * heads)
    assert_commutes(layer, x, lambda x: flop_tokens(x, grid))


def test_attention_equals_timms_on_the_dense_weights() -> None:
    dim, heads = 16, 2
    layer, dense = drawn(FlopAttention(dim, heads, qkv_bias=True)), Attention(dim, heads, qkv_bias=True).double().eval()
    width = half(dim, "dim") // heads
    # timm's heads hold contiguous channels; ours hold an even and an odd part each.
    order = torch.cat([torch.arange(h * width, (h + 1) * width) + p * dim // 2 for h in range(heads) for p in (0, 1)])
    qkv = torch.block_diag(layer.qkv.even.weight, layer.qkv.odd.weight)
    bias = F.pad(layer.qkv.even.bias, (0, 3 * dim // 2))
    rows = torch.cat([k * dim // 2 + order % (dim // 2) + (order >= dim // 2) * 3 * dim // 2 for k in range(3)])
    proj = torch.block_diag(layer.proj.even.weight, layer.proj.odd.weight)[:, order]
    with torch.no_grad():
        dense.qkv.weight.copy_(qkv[rows])
        dense.qkv.bias.copy_(bias[rows])
        dense.proj.weight.copy_(proj)
        dense.proj.bias.copy_(F.pad(layer.proj.even.bias, (0, dim // 2)))
    x = features(2, 6, dim)
    torch.testing.assert_close(layer(x), dense(x))


BLOCKS = {
    "vit": (partial(_make_block, 9, 0, 16, num_heads=2, qkv_bias=True, init_values=0.5), Block, (4, 6, 16)),
    "convnext": (lambda drop_path=0.0: FlopConvNeXtBlock(16, 0.5, drop_path), ConvNeXtBlock, (4, 16, 2, 3)),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", BLOCKS)
def test_a_block_on_separate_halves_equals_timms_block_on_the_same_layers(family: str, dtype: torch.dtype) -> None:
    make, timms, shape = BLOCKS[family]
    block = drawn(make()).to(dtype)
    x = features(*shape).to(dtype).requires_grad_()
    weights = [x, *block.parameters()]
    apart, joined = block(x), timms.forward(block, x)
    tolerance = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 0.05}[dtype]
    assert relative_error(apart, joined) < tolerance
    found, expected = (torch.autograd.grad((y.double() ** 2).sum(), weights) for y in (apart, joined))
    for one, other in zip(found, expected, strict=True):
        assert relative_error(one, other) < tolerance


@pytest.mark.parametrize("family", BLOCKS)
def test_stochastic_depth_drops_both_halves_of_an_image_or_none(family: str) -> None:
    make, _, shape = BLOCKS[family]
    block = drawn(make(drop_path=0.5)).train()
    x = features(64, *shape[1:])
    if family == "vit":
        block.drop_path1 = nn.Identity()
        nn.init.zeros_(block.ls1.gamma)
    axis = -1 if family == "vit" else 1
    even, odd = (part.flatten(1).abs().amax(1) > 1e-9 for part in split(block(x) - x, axis))
    assert (even == odd).all() and even.any() and not even.all()


def test_depthwise_kernels_are_mirrored_by_kind() -> None:
    layer = drawn(FlopDepthwiseConv(16, 5))
    ee, eo, oe, oo = layer.kernel().chunk(4)
    for kernel, part, sign in ((ee, "even_to_even", 1), (eo, "even_to_odd", -1), (oe, "odd_to_even", -1),
                               (oo, "odd_to_odd", 1)):  # fmt: skip
        torch.testing.assert_close(kernel, mirror_kernel(getattr(layer, part), 5, sign))


def test_a_causal_mask_is_refused() -> None:
    with pytest.raises(ValueError, match="causal"):
        FlopAttention(8, 2)(torch.zeros(1, 3, 8), is_causal=True)


@few
@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 5), grids)
def test_patch_convolution_commutes_for_even_and_odd_kernels(
    channels: int, outer: int, kernel: int, grid: tuple[int, int]
) -> None:
    layer = drawn(FlopPatchConv(channels, 2 * outer, kernel, scale=0.5))
    image = features(2, channels, grid[0] * kernel, grid[1] * kernel)
    y = layer(image)
    assert relative_error(layer(image.flip(-1)), flop_grid(y)) < 1e-10
    # (1, 1) kernels and grids have no odd part: there the two agree.
    if kernel > 1 or grid[1] > 1:
        assert relative_error(layer(image.flip(-1)), y) > 1e-4


def test_patch_embedding_refuses_remaining_columns() -> None:
    with pytest.raises(ValueError, match="width 30.*multiple of 8"):
        FlopPatchEmbed(img_size=(32, 30), patch_size=8, embed_dim=4)
    with pytest.raises(ValueError, match="width 30"):
        FlopPatchConv(3, 4, 8)(torch.zeros(1, 3, 32, 30))
    with pytest.raises(ValueError, match="dynamic_img_pad"):
        FlopPatchEmbed(img_size=32, patch_size=8, embed_dim=4, dynamic_img_pad=True)


@few
@given(grids, grids)
def test_position_embedding_is_mirrored_and_stays_so_when_resized(
    grid: tuple[int, int], other: tuple[int, int]
) -> None:
    embed = drawn(FlopPosEmbed(grid, 4))
    torch.testing.assert_close(flop_tokens(embed(), grid), embed())
    resized = embed.resized(other)
    assert resized.grid_size == other
    torch.testing.assert_close(flop_tokens(resized(), other), resized())
    torch.testing.assert_close(resized(), embed(other), atol=1e-6, rtol=1e-5)  # timm resamples in float32


@few
@given(quarters, grids, st.sampled_from([3, 5, 7]))
def test_depthwise_convolution_commutes_on_even_and_odd_grids(
    channels: int, grid: tuple[int, int], kernel: int
) -> None:
    layer = drawn(FlopDepthwiseConv(4 * channels, kernel))
    assert_commutes(layer, features(2, 4 * channels, *grid), flop_grid)


def test_depthwise_convolution_has_no_frozen_parameters() -> None:
    layer = FlopDepthwiseConv(8, 7)
    assert all(p.requires_grad for p in layer.parameters())
    assert sum(p.numel() for p in layer.parameters()) == 2 * 2 * 7 * 4 + 2 * 2 * 7 * 3 + 4


@pytest.mark.parametrize("layer", [BiparityAffine, BiparityLinear, TokenMixing, BiparityMlp, FlopResBlock])
@pytest.mark.parametrize("grid", [(2, 4), (3, 5), (2, 2), (1, 3)])
def test_layers_of_two_parities_commute(layer: type[nn.Module], grid: tuple[int, int]) -> None:
    columns = ColumnParity(grid)
    args = {
        BiparityAffine: (8,),
        BiparityLinear: (8, 12),
        TokenMixing: (columns,),
        BiparityMlp: (8, 16, columns),
        FlopResBlock: (8, columns),
    }[layer]
    drawn_layer = drawn(layer(*args))

    def on_tensors(x: Tensor) -> Tensor:
        return drawn_layer(x) if layer is FlopResBlock else columns.join(drawn_layer(columns.split(x)))

    x = features(2, grid[0] * grid[1], 8)
    assert_commutes(on_tensors, x, lambda x: columns.join(flop_parts(columns.split(x))))


def test_one_call_of_a_layer_gives_products_with_and_without_its_bias() -> None:
    layer = drawn(nn.Linear(5, 7))
    calls = []
    layer.register_forward_hook(lambda *_: calls.append(1))
    x, y = features(2, 3, 5), features(2, 4, 5)
    for first, second in ((x, y), (x[:, :0], y), (x, y[:, :0])):
        with_bias, without = apply_with_and_without_bias(layer, first, second)
        torch.testing.assert_close(with_bias, F.linear(first, layer.weight, layer.bias))
        torch.testing.assert_close(without, F.linear(second, layer.weight))
    assert len(calls) == 3


@pytest.mark.parametrize("make", [
    lambda: FlopLinear(8, 12), lambda: FlopMlp(8, 16, norm_layer=FlopLayerNorm), lambda: FlopAttention(8, 2),
    lambda: FlopLayerNorm(8), lambda: FlopLayerScale(8, 0.5), FlopGELU,
])  # fmt: skip
def test_a_pair_of_halves_gives_a_pair(make) -> None:
    layer, x = drawn(make()), features(2, 6, 8)
    pair = layer(split(x))
    assert isinstance(pair, tuple)
    torch.testing.assert_close(join(*pair), layer(x))
    if isinstance(layer, FlopLinear | FlopMlp):
        torch.testing.assert_close(layer(x, even_only=True), pair[0])


def test_token_mixing_equals_a_dense_matrix_that_commutes_with_the_mirror() -> None:
    grid = (2, 3)
    columns, tokens = ColumnParity(grid), 6
    layer = drawn(TokenMixing(columns))
    nn.init.zeros_(layer.even.bias), nn.init.zeros_(layer.odd.bias)
    basis = columns.from_raster(torch.eye(tokens, dtype=torch.float64)[None])[0]
    dense = basis.T @ torch.block_diag(layer.even.weight, layer.odd.weight) @ basis
    mirror = torch.eye(tokens, dtype=torch.float64).unflatten(0, grid).flip(1).flatten(0, 1)
    torch.testing.assert_close(dense @ mirror, mirror @ dense)
    x = features(2, tokens, 4)
    mixed = columns.join(layer(columns.split(columns.from_raster(x))))
    torch.testing.assert_close(columns.to_raster(mixed), dense @ x)


@pytest.mark.parametrize("grid", [(2, 4), (3, 5)])
def test_the_two_parity_activation_acts_on_the_image(grid: tuple[int, int]) -> None:
    columns = ColumnParity(grid)
    x = features(2, grid[0] * grid[1], 8)
    found = columns.join(BiparityMlp(8, 8, columns).activate(columns.split(columns.from_raster(x))))
    torch.testing.assert_close(change_basis(columns.to_raster(found)), quick_gelu(change_basis(x)))


def test_stochastic_depth_drops_all_parts_of_an_image_or_none() -> None:
    columns = ColumnParity((2, 2))
    block = drawn(FlopResBlock(8, columns, drop_path=0.5)).train()
    x = features(64, 4, 8)
    assert_commutes_with_seed(block, x, columns)
    kept = (block(x) - x).abs().amax(-1) > 1e-9  # (B, N)
    assert (kept.all(1) | ~kept.any(1)).all() and kept.any() and not kept.all()


def assert_commutes_with_seed(block: nn.Module, x: Tensor, columns: ColumnParity) -> None:
    def seeded(x: Tensor) -> Tensor:
        torch.manual_seed(3)
        return block(x)

    assert_commutes(seeded, x, lambda x: columns.join(flop_parts(columns.split(x))))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FlopLinear(7, 8), "in_features is 7"),
        (lambda: FlopLinear(8, 7), "out_features is 7"),
        (lambda: FlopLayerNorm(5), "num_channels is 5"),
        (lambda: FlopAttention(12, 4), "embed_dim=12.*multiple of 8"),
        (lambda: FlopPatchConv(3, 5, 4), "embed_dim is 5"),
        (lambda: FlopDepthwiseConv(6), "embed_dim=6.*multiple of 4"),
        (lambda: FlopDepthwiseConv(8, 4), "kernel_size=4.*odd"),
        (lambda: BiparityLinear(8, 7), "out_features is 7"),
    ],
)
def test_widths_that_do_not_split_are_refused(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_ordinary_layers_fail_the_same_check() -> None:
    x = features(2, 6, 16)
    for layer in (nn.Linear(16, 16), nn.LayerNorm(16), nn.GELU(), Mlp(16, 32), Attention(16, 2)):
        layer = drawn(layer)
        assert relative_error(layer(flop_tokens(x, (2, 3))), flop_tokens(layer(x), (2, 3))) > 1e-3
