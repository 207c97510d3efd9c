"""ResMLP as X, E(X) and H(X) on timm's `MlpMixer` (Bökman et al. 2025, sec. 4.1 and appendix C).

Token mixing acts on columns, which the flop mirrors, so E(ResMLP) keeps two parities: of the channel and of the column.
Its tokens are even columns (left + right)/sqrt 2, then the middle column of an odd grid, which is even too, then odd
columns (left - right)/sqrt 2. A feature is invariant where the two parities agree: even-even, and odd-odd.

Shape suffixes: B batch, N tokens, C channels, H W grid.
"""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any, NamedTuple

import torch
from einops import rearrange
from timm.layers import DropPath
from timm.layers.activations import quick_gelu
from timm.models import build_model_with_cfg
from timm.models._features import feature_take_indices
from timm.models.mlp_mixer import Affine, MlpMixer, ResBlock
from timm.models.mlp_mixer import checkpoint_filter_fn as mixer_filter_fn
from torch import Tensor, nn

from flopeq.irreps import butterfly, change_basis, half, join, split
from flopeq.layers import FlopPatchEmbed, pair
from flopeq.products import Linear, linear
from flopeq.variants import FlopHead, baseline_of, check_head, register, split_point, untrained_cfgs

__all__ = ["FlopMlpMixer"]


class ColumnParity:
    """The mirror symmetry of a grid's columns: tokens in raster order <-> tokens of even and odd columns.

    `num_even` tokens are even (with the middle column of an odd grid), `num_odd` are odd.
    """

    def __init__(self, grid_size: tuple[int, int]) -> None:
        self.height, self.width = grid_size
        self.num_odd = self.height * (self.width // 2)
        self.num_middle = self.height * (self.width % 2)
        self.num_even = self.num_odd + self.num_middle

    def mirror_basis(self, x_BNC: Tensor) -> Tensor:
        """Even and odd columns <-> left, middle and mirrored right columns; its own inverse."""
        return change_basis(x_BNC, dim=1, fixed=self.num_middle)

    def from_raster(self, x_BNC: Tensor) -> Tensor:
        """Tokens in raster order -> tokens by parity."""
        grid = rearrange(x_BNC, "B (H W) C -> B H W C", H=self.height)
        pairs = self.width // 2
        parts = (grid[:, :, :pairs], grid[:, :, pairs : self.width - pairs], grid[:, :, self.width - pairs :].flip(2))
        return self.mirror_basis(torch.cat([part.flatten(1, 2) for part in parts], dim=1))

    def to_raster(self, x_BNC: Tensor) -> Tensor:
        """The inverse of `from_raster`."""
        parts = self.mirror_basis(x_BNC).split([self.num_odd, self.num_middle, self.num_odd], dim=1)
        left, middle, right = (rearrange(part, "B (H W) C -> B H W C", H=self.height) for part in parts)
        return torch.cat((left, middle, right.flip(2)), dim=2).flatten(1, 2)

    def split(self, x_BNC: Tensor) -> Parts:
        """A tensor's four parts."""
        even, odd = split(x_BNC)
        sizes = [self.num_even, self.num_odd]
        return Parts(*even.split(sizes, dim=1), *odd.split(sizes, dim=1))

    def join(self, parts: Parts) -> Tensor:
        """The inverse of `split`."""
        return join(torch.cat((parts.ee, parts.eo), dim=1), torch.cat((parts.oe, parts.oo), dim=1))

    def mix(self, even: Tensor, odd: Tensor) -> tuple[Tensor, Tensor]:
        """Even and odd columns -> left (with the middle) and right ones; its own inverse."""
        paired, middle = even.split([self.num_odd, self.num_middle], dim=1)
        left, right = butterfly(paired, odd)
        return torch.cat((left, middle), dim=1) if self.num_middle else left, right


class Parts(NamedTuple):
    """Features by (channel, column) parity: (B, num_even, C/2) where the column is even, else (B, num_odd, C/2).

    Inside a block they travel apart, since each meets its own weights; between blocks they are one tensor.
    """

    ee: Tensor
    eo: Tensor
    oe: Tensor
    oo: Tensor

    @property
    def invariant(self) -> Tensor:
        """What the flop leaves alone, ee, then oo: (B, N, C/2)."""
        return torch.cat((self.ee, self.oo), dim=1)

    def scaled(self, scale: Tensor) -> Parts:
        """The parts times a vector (C,) over channels."""
        even, odd = split(scale)
        return Parts(even * self.ee, even * self.eo, odd * self.oe, odd * self.oo)


class BiparityAffine(nn.Module):
    """y = alpha * x + beta, where beta acts on invariant features only: even-even and odd-odd (eq. 6).

    Shape: parts of (B, N, C) -> the same.
    """

    def __init__(self, dim: int, device=None, dtype=None) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(1, 1, dim, device=device, dtype=dtype))
        self.beta = nn.Parameter(torch.zeros(1, 1, dim, device=device, dtype=dtype))

    def forward(self, x: Parts) -> Parts:
        y = x.scaled(self.alpha)
        even, odd = split(self.beta)
        return y._replace(ee=y.ee + even, oo=y.oo + odd)


class BiparityLinear(nn.Module):
    """Block diagonal linear map over channels with a bias on each invariant part, even-even and odd-odd.

    Seen on the image, the odd bias is opposite on mirrored columns.

    Shape: parts of (B, N, in_features) -> parts of (B, N, out_features).
    Cost: in*out/2 multiply-adds per token, half of nn.Linear.
    """

    def __init__(self, in_features: int, out_features: int, device=None, dtype=None) -> None:
        super().__init__()
        inner, outer = half(in_features, "in_features"), half(out_features, "out_features")
        self.even = Linear(inner, outer, device=device, dtype=dtype)
        self.odd = Linear(inner, outer, device=device, dtype=dtype)

    def forward(self, x: Parts) -> Parts:
        w_even, w_odd = self.even.weight, self.odd.weight
        return Parts(self.even(x.ee), linear(x.eo, w_even), linear(x.oe, w_odd), self.odd(x.oo))


class TokenMixing(nn.Module):
    """Block diagonal linear map over tokens, one block for even and one for odd columns (appendix C).

    Shape: parts of (B, N, C) -> the same.
    Cost: N^2/2 multiply-adds per channel on an even grid, half of nn.Linear.
    """

    def __init__(self, columns: ColumnParity, device=None, dtype=None) -> None:
        super().__init__()
        self.even = nn.Linear(columns.num_even, columns.num_even, device=device, dtype=dtype)
        self.odd = nn.Linear(columns.num_odd, columns.num_odd, device=device, dtype=dtype)

    def forward(self, x: Parts) -> Parts:
        # Weights from the left, W x + b, where nn.Linear would have features transposed before and after.
        w_even, w_odd = (layer.weight.expand(x.ee.shape[0], -1, -1) for layer in (self.even, self.odd))
        b_even, b_odd = self.even.bias[:, None], self.odd.bias[:, None]
        return Parts(
            torch.baddbmm(b_even, w_even, x.ee), w_odd @ x.eo, w_even @ x.oe, torch.baddbmm(b_odd, w_odd, x.oo)
        )


class BiparityMlp(nn.Module):
    """Channel MLP of E(ResMLP); its activation x*sigmoid(1.702x) acts where the flop only permutes features.

    Shape: parts of (B, N, C) -> the same.
    """

    def __init__(
        self, dim: int, hidden_features: int, columns: ColumnParity, drop: float = 0.0, device=None, dtype=None
    ) -> None:
        super().__init__()
        self.columns = columns
        self.fc1 = BiparityLinear(dim, hidden_features, device, dtype)
        self.fc2 = BiparityLinear(hidden_features, dim, device, dtype)
        self.drop = nn.Dropout(drop)

    def activate(self, x: Parts) -> Parts:
        """Columns and channels to the regular basis, x*sigmoid(1.702x) there, and back."""
        regular = self._swap_basis(x)
        return self._swap_basis(Parts(*(quick_gelu(part) for part in regular)))

    def _swap_basis(self, x: Parts) -> Parts:
        """Both changes of basis are involutions and commute, so this one is its own inverse too."""
        even, odd = self.columns.mix(x.ee, x.eo), self.columns.mix(x.oe, x.oo)
        (ee, oe), (eo, oo) = butterfly(even[0], odd[0]), butterfly(even[1], odd[1])
        return Parts(ee, eo, oe, oo)

    def forward(self, x: Parts) -> Parts:
        hidden = Parts(*(self.drop(part) for part in self.activate(self.fc1(x))))
        return Parts(*(self.drop(part) for part in self.fc2(hidden)))


class FlopResBlock(nn.Module):
    """timm's `ResBlock` on features of two parities (eq. 7).

    Shape: (B, N, C) -> (B, N, C), or the invariant features, (B, N, C/2), with `invariants_only`.
    """

    def __init__(
        self,
        dim: int,
        columns: ColumnParity,
        mlp_ratio: float = 4,
        init_values: float = 1e-4,
        drop: float = 0.0,
        drop_path: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.columns = columns
        self.norm1 = BiparityAffine(dim, **dd)
        self.linear_tokens = TokenMixing(columns, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm2 = BiparityAffine(dim, **dd)
        self.mlp_channels = BiparityMlp(dim, int(dim * mlp_ratio), columns, drop=drop, **dd)
        self.ls1 = nn.Parameter(init_values * torch.ones(dim, **dd))
        self.ls2 = nn.Parameter(init_values * torch.ones(dim, **dd))

    def forward(self, x: Tensor, invariants_only: bool = False) -> Tensor:
        parts = self.columns.split(x)
        parts = self._add(parts, self.linear_tokens(self.norm1(parts)).scaled(self.ls1))
        update = self.mlp_channels(self.norm2(parts)).scaled(self.ls2)
        if invariants_only:  # half of the last product is then dead
            return parts.invariant + self.drop_path(update.invariant)
        return self.columns.join(self._add(parts, update))

    def _add(self, parts: Parts, update: Parts) -> Parts:
        """The residual connection; stochastic depth drops all four parts of an image's update, or none."""
        if isinstance(self.drop_path, DropPath):
            keep = self.drop_path(parts.ee.new_ones(len(parts.ee), 1, 1))
            update = Parts(*(keep * part for part in update))
        return Parts(*(part + more for part, more in zip(parts, update, strict=True)))


class EntryBlock(ResBlock):
    """The first ordinary block of a hybrid: tokens back to raster order, channels to the regular basis."""

    def __init__(self, *args: Any, columns: ColumnParity, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.columns = columns

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(change_basis(self.columns.to_raster(x)))


class ParityStem(FlopPatchEmbed):
    """Patch embedding whose tokens come sorted by the parity of their column."""

    def __init__(self, *args: Any, columns: ColumnParity, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.columns = columns

    def forward(self, image: Tensor) -> Tensor:
        return self.columns.from_raster(super().forward(image))


class FlopMlpMixer(FlopHead, MlpMixer):
    """A ResMLP whose first `num_flop_blocks` blocks commute with the flop (sec. 4.1): E with all, H with fewer.

    Arguments are timm's `MlpMixer`'s and, besides,
        num_flop_blocks: 1 to num_blocks (0 is timm's own model, which the entry points return).
        init_values: initial LayerScale.
        head: "even" for invariant features alone, or "even+abs_odd" to append the absolute values of the others (E).
    `forward_features` of E gives tokens by the parity of their column; `forward_intermediates` and `features_only`
    give image grids of even and odd channels.
    Raises: ValueError for widths that do not split and image widths that patches do not fill.
    """

    def __init__(
        self,
        num_flop_blocks: int,
        head: str = "even",
        num_classes: int = 1000,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        patch_size: int | tuple[int, int] = 16,
        num_blocks: int = 8,
        embed_dim: int = 512,
        init_values: float = 1e-4,
        device=None,
        dtype=None,
        **kwargs: Any,
    ) -> None:
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        half(embed_dim, "embed_dim")
        height, width = (side // patch for side, patch in zip(pair(img_size), pair(patch_size), strict=True))
        columns = ColumnParity((height, width))
        depth = itertools.count()

        def block(dim: int, seq_len: int, mlp_ratio: float, drop: float, drop_path: float, **layers: Any) -> nn.Module:
            index = next(depth)
            shared = {"init_values": init_values, "drop": drop, "drop_path": drop_path, **dd}
            if index < num_flop_blocks:
                return FlopResBlock(dim, columns, mlp_ratio, **shared)
            layers |= shared
            if index == num_flop_blocks:
                return EntryBlock(dim, seq_len, mlp_ratio, columns=columns, **layers)
            return ResBlock(dim, seq_len, mlp_ratio, **layers)

        super().__init__(
            num_classes=num_classes,
            img_size=img_size,  # pyright: ignore[reportArgumentType]
            in_chans=in_chans,
            patch_size=patch_size,  # pyright: ignore[reportArgumentType]
            num_blocks=num_blocks,
            embed_dim=embed_dim,
            block_layer=block,  # pyright: ignore[reportArgumentType]
            norm_layer=Affine,
            **dd,
            **kwargs,
        )
        self.columns, self.num_flop_blocks = columns, num_flop_blocks
        self.stem = ParityStem(img_size, patch_size, in_chans, embed_dim, columns=columns, **dd)
        equivariant = num_flop_blocks == num_blocks
        self.init_head(head, equivariant, **dd)
        if equivariant:
            self.norm = nn.Identity()
        self.fc_norm = Affine(self.head_hidden_size, **dd) if equivariant else nn.Identity()

    def invariants(self, x: Tensor, dim: int = -1) -> Tensor:
        if not self.equivariant:
            return x
        parts = self.columns.split(x)
        if not self.append_abs_odd:
            return parts.invariant
        return join(parts.invariant, torch.cat((parts.eo, parts.oe), dim=1).abs())

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        return super().forward_head(self.fc_norm(self.invariants(x)), pre_logits)

    def forward(self, x: Tensor) -> Tensor:
        if self.may_skip:
            invariants = self.blocks[-1](self.blocks[:-1](self.stem(x)), invariants_only=True)
            return super().forward_head(self.fc_norm(invariants))
        return super().forward(x)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Features of chosen blocks, as timm does it; those of equivariant blocks come in raster order too."""
        taken, _ = feature_take_indices(len(self.blocks), indices)
        final, features = super().forward_intermediates(x, indices, norm, stop_early, output_fmt="NLC")
        features = [
            self.columns.to_raster(feature) if index < self.num_flop_blocks else feature
            for index, feature in zip(taken, features, strict=True)
        ]
        if output_fmt == "NCHW":
            features = [rearrange(feature, "B (H W) C -> B C H W", H=self.columns.height) for feature in features]
        return features if intermediates_only else (final, features)


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """X takes what timm's ResMLPs take; E and H take their own checkpoints as they are."""
    return state_dict if isinstance(model, FlopMlpMixer) else mixer_filter_fn(state_dict, model)


def _create(
    name: str, pretrained: bool, num_flop_blocks: int | None = None, head: str = "even", **kwargs: Any
) -> nn.Module:
    kwargs = SIZES[baseline_of(name)] | kwargs
    num_flop_blocks = split_point(name, kwargs["num_blocks"], num_flop_blocks)
    check_head(head, num_flop_blocks == kwargs["num_blocks"])
    if num_flop_blocks:
        kwargs |= {"num_flop_blocks": num_flop_blocks, "head": head}
    else:
        kwargs |= {"norm_layer": Affine, "block_layer": partial(ResBlock, init_values=kwargs.pop("init_values"))}
    return build_model_with_cfg(
        FlopMlpMixer if num_flop_blocks else MlpMixer,
        name,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": kwargs.pop("out_indices", 3), "feature_cls": "getter"},
        **kwargs,
    )


SIZES: dict[str, dict[str, Any]] = {
    "resmlp_12_224": {"embed_dim": 384, "num_blocks": 12, "init_values": 0.1},
    "resmlp_24_224": {"embed_dim": 384, "num_blocks": 24, "init_values": 1e-5},
    "resmlp_base_24_224": {"embed_dim": 768, "num_blocks": 24, "init_values": 1e-6},
    "resmlp_large_24_224": {"embed_dim": 1280, "num_blocks": 24, "init_values": 1e-6},
}
SIZES = {name: size | {"patch_size": 16, "mlp_ratio": 4} for name, size in SIZES.items()}
OURS = ("resmlp_base_24_224", "resmlp_large_24_224")

default_cfgs = untrained_cfgs(SIZES, "EH") | untrained_cfgs(OURS, "X")

for _name in SIZES:
    register(__name__, _name, "XEH" if _name in OURS else "EH", _create)
