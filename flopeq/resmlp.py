"""ResMLP as X, E(X) and H(X) on timm's `MlpMixer` (Bökman et al. 2025, sec. 4.1 and appendix C).

Token mixing acts on columns, which the flop mirrors, so E(ResMLP) keeps two parities: of the channel and of the column.
Its tokens are even columns (left + right)/sqrt 2, then the middle column of an odd grid, which is even too, then odd
columns (left - right)/sqrt 2. A feature is invariant where the two parities agree: even-even, and odd-odd.

Shape suffixes: B batch, N tokens, C channels, H W grid.
"""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from timm.layers import DropPath
from timm.layers.activations import quick_gelu
from timm.models import build_model_with_cfg
from timm.models._features import feature_take_indices
from timm.models.mlp_mixer import Affine, MlpMixer, ResBlock
from timm.models.mlp_mixer import checkpoint_filter_fn as mixer_filter_fn
from torch import Tensor, nn

from flopeq.irreps import change_basis, half, join, split
from flopeq.layers import FlopPatchEmbed, pair
from flopeq.variants import FlopHead, baseline_of, check_num_flop_blocks, default_split, register, untrained_cfgs

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

    def split(self, x_BNC: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(channel, column) parities: even-even, even-odd, odd-even, odd-odd; (B, num_even or num_odd, C/2) each."""
        even, odd = split(x_BNC)
        sizes = [self.num_even, self.num_odd]
        ee, eo = even.split(sizes, dim=1)
        oe, oo = odd.split(sizes, dim=1)
        return ee, eo, oe, oo

    def join(self, ee: Tensor, eo: Tensor, oe: Tensor, oo: Tensor) -> Tensor:
        """The inverse of `split`."""
        return join(torch.cat((ee, eo), dim=1), torch.cat((oe, oo), dim=1))

    def invariants(self, x_BNC: Tensor) -> Tensor:
        """What the flop leaves alone, even-even tokens, then odd-odd ones; (B, N, C/2)."""
        ee, _, _, oo = self.split(x_BNC)
        return torch.cat((ee, oo), dim=1)


class BiparityAffine(nn.Module):
    """y = alpha * x + beta, where beta acts on invariant features only: even-even and odd-odd (eq. 6).

    Shape: (B, N, C) -> (B, N, C).
    """

    def __init__(self, dim: int, columns: ColumnParity, device=None, dtype=None) -> None:
        super().__init__()
        self.columns = columns
        self.alpha = nn.Parameter(torch.ones(1, 1, dim, device=device, dtype=dtype))
        self.beta = nn.Parameter(torch.zeros(1, 1, dim, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        ee, eo, oe, oo = self.columns.split(x)
        alpha_even, alpha_odd = split(self.alpha)
        beta_even, beta_odd = split(self.beta)
        return self.columns.join(
            ee * alpha_even + beta_even, eo * alpha_even, oe * alpha_odd, oo * alpha_odd + beta_odd
        )


class BiparityLinear(nn.Module):
    """Block diagonal linear map over channels with a bias on each invariant part, even-even and odd-odd.

    Seen on the image, the odd bias is opposite on mirrored columns.

    Shape: (B, N, in_features) -> (B, N, out_features).
    Cost: in*out/2 multiply-adds per token, half of nn.Linear.
    """

    def __init__(self, in_features: int, out_features: int, columns: ColumnParity, device=None, dtype=None) -> None:
        super().__init__()
        inner, outer = half(in_features, "in_features"), half(out_features, "out_features")
        self.columns = columns
        self.even = nn.Linear(inner, outer, device=device, dtype=dtype)
        self.odd = nn.Linear(inner, outer, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        ee, eo, oe, oo = self.columns.split(x)
        return self.columns.join(
            self.even(ee), F.linear(eo, self.even.weight), F.linear(oe, self.odd.weight), self.odd(oo)
        )


class TokenMixing(nn.Module):
    """Block diagonal linear map over tokens, one block for even and one for odd columns (appendix C).

    Shape: (B, N, C) -> (B, N, C).
    Cost: N^2/2 multiply-adds per channel on an even grid, half of nn.Linear.
    """

    def __init__(self, columns: ColumnParity, device=None, dtype=None) -> None:
        super().__init__()
        self.columns = columns
        self.even = nn.Linear(columns.num_even, columns.num_even, device=device, dtype=dtype)
        self.odd = nn.Linear(columns.num_odd, columns.num_odd, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        ee, eo, oe, oo = (part.mT for part in self.columns.split(x))
        mixed = (self.even(ee), F.linear(eo, self.odd.weight), F.linear(oe, self.even.weight), self.odd(oo))
        return self.columns.join(*(part.mT for part in mixed))


class BiparityMlp(nn.Module):
    """Channel MLP of E(ResMLP); its activation x*sigmoid(1.702x) acts where the flop only permutes features.

    Shape: (B, N, C) -> (B, N, C), or the invariant features, (B, N, C/2), with `invariants_only`.
    """

    def __init__(
        self, dim: int, hidden_features: int, columns: ColumnParity, drop: float = 0.0, device=None, dtype=None
    ) -> None:
        super().__init__()
        self.columns = columns
        self.fc1 = BiparityLinear(dim, hidden_features, columns, device, dtype)
        self.fc2 = BiparityLinear(hidden_features, dim, columns, device, dtype)
        self.drop = nn.Dropout(drop)

    def activate(self, x: Tensor) -> Tensor:
        """Both parities to the regular basis, x*sigmoid(1.702x) there, and back."""
        regular = change_basis(self.columns.mirror_basis(x))
        return self.columns.mirror_basis(change_basis(quick_gelu(regular)))

    def forward(self, x: Tensor, invariants_only: bool = False) -> Tensor:
        hidden = self.drop(self.activate(self.fc1(x)))
        if not invariants_only:
            return self.drop(self.fc2(hidden))
        ee, _, _, oo = self.columns.split(hidden)
        return self.drop(torch.cat((self.fc2.even(ee), self.fc2.odd(oo)), dim=1))


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
        self.norm1 = BiparityAffine(dim, columns, **dd)
        self.linear_tokens = TokenMixing(columns, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm2 = BiparityAffine(dim, columns, **dd)
        self.mlp_channels = BiparityMlp(dim, int(dim * mlp_ratio), columns, drop=drop, **dd)
        self.ls1 = nn.Parameter(init_values * torch.ones(dim, **dd))
        self.ls2 = nn.Parameter(init_values * torch.ones(dim, **dd))

    def forward(self, x: Tensor, invariants_only: bool = False) -> Tensor:
        x = x + self.drop_path(self.ls1 * self.linear_tokens(self.norm1(x)))
        y = self.mlp_channels(self.norm2(x), invariants_only)
        if not invariants_only:
            return x + self.drop_path(self.ls2 * y)
        ls_even, ls_odd = split(self.ls2)
        ee, oo = y.split([self.columns.num_even, self.columns.num_odd], dim=1)
        return self.columns.invariants(x) + self.drop_path(torch.cat((ls_even * ee, ls_odd * oo), dim=1))


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
        if not self.append_abs_odd:
            return self.columns.invariants(x)
        _, eo, oe, _ = self.columns.split(x)
        return join(self.columns.invariants(x), torch.cat((eo, oe), dim=1).abs())

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
    num_flop_blocks = default_split(name, kwargs["num_blocks"]) if num_flop_blocks is None else num_flop_blocks
    check_num_flop_blocks(num_flop_blocks, kwargs["num_blocks"])
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
