"""ResMLP as X, E(X) and H(X) on timm's `MlpMixer` (Bökman et al. 2025, sec. 4.1 and appendix C).

Token mixing acts on columns, which the flop mirrors, so features of E(ResMLP) have a channel and a column parity.
The tokens are the even columns (left + right)/sqrt 2, then the middle column of an odd grid, which is also even, then
the odd columns (left - right)/sqrt 2. A feature is invariant if its two parities are equal: even-even or odd-odd.

Shape suffixes: B batch, N tokens, C channels, H W grid.
"""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any

import torch
from einops import rearrange
from timm.models import build_model_with_cfg
from timm.models._features import feature_take_indices
from timm.models.mlp_mixer import Affine, MlpMixer, ResBlock
from timm.models.mlp_mixer import checkpoint_filter_fn as mixer_filter_fn
from torch import Tensor, nn

from flopeq.irreps import change_basis, half, join
from flopeq.layers.biparity import BiparityAffine, ColumnParity, FlopResBlock
from flopeq.layers.conv import pair
from flopeq.layers.embed import FlopPatchEmbed
from flopeq.models.variants import (
    BlockSequence,
    FlopHead,
    baseline_name,
    check_head,
    make_default_cfgs,
    refuse_arguments,
    register_variants,
    resolve_num_flop_blocks,
)

__all__ = ["FlopMlpMixer"]

_FIXED = "E(ResMLP) and H(ResMLP) use layers that commute with the flop; num_flop_blocks=0 gives X, which takes it"

REFUSED: dict[str, str] = dict.fromkeys(("block_layer", "mlp_layer", "norm_layer", "act_layer", "stem_norm"), _FIXED)
"""Arguments of timm's `MlpMixer` that E and H do not take, with the reason."""

FIXED_GRID: dict[str, str] = dict.fromkeys(
    ("dynamic_img_size", "dynamic_img_pad"), "token mixing has a weight for every pair of tokens; set img_size instead"
)


class BasisChangeBlock(ResBlock):
    """The first ordinary block of a hybrid. It changes tokens to raster order and channels to the regular basis."""

    def __init__(self, *args: Any, columns: ColumnParity, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.columns = columns

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(change_basis(self.columns.to_raster(x)))


class ParityPatchEmbed(FlopPatchEmbed):
    """Patch embedding with tokens sorted by column parity."""

    def __init__(self, *args: Any, columns: ColumnParity, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.columns = columns

    def forward(self, image: Tensor) -> Tensor:
        return self.columns.from_raster(super().forward(image))


class FlopMlpMixer(FlopHead, MlpMixer):
    """A ResMLP whose first `num_flop_blocks` blocks commute with the flop (sec. 4.1): all in E, fewer in H.

    Takes the arguments of timm's `MlpMixer`, except for those of `REFUSED`, and:
        num_flop_blocks: 1 to num_blocks. For 0 the entry points return timm's model.
        init_values: initial value of LayerScale.
        head: "even" for invariant features, or "even+abs_odd" to append the absolute values of the others (E only).
    `forward_features` of E returns tokens sorted by column parity. `forward_intermediates` and `features_only` return
    image grids of even and odd channels.
    Raises: ValueError for widths that do not split into halves, for image widths that are not a multiple of the patch
    width, and for the arguments of `REFUSED`.
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
        mlp_ratio: float = 4.0,
        init_values: float = 1e-4,
        device=None,
        dtype=None,
        **kwargs: Any,
    ) -> None:
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        refuse_arguments({name: value or None for name, value in kwargs.items()}, REFUSED | FIXED_GRID)
        half(embed_dim, "embed_dim")
        if not isinstance(mlp_ratio, int | float):
            raise ValueError(f"mlp_ratio={mlp_ratio!r} is not a number: ResMLP's blocks have one channel MLP")
        self.init_values = init_values  # timm's constructor calls init_weights
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
                return BasisChangeBlock(dim, seq_len, mlp_ratio, columns=columns, **layers)
            return ResBlock(dim, seq_len, mlp_ratio, **layers)

        super().__init__(
            num_classes=num_classes,
            img_size=img_size,  # pyright: ignore[reportArgumentType]
            in_chans=in_chans,
            patch_size=patch_size,  # pyright: ignore[reportArgumentType]
            num_blocks=num_blocks,
            embed_dim=embed_dim,
            mlp_ratio=mlp_ratio,  # pyright: ignore[reportArgumentType]
            block_layer=block,  # pyright: ignore[reportArgumentType]
            norm_layer=Affine,
            **dd,
            **{name: value for name, value in kwargs.items() if name not in REFUSED | FIXED_GRID},
        )
        self.blocks = BlockSequence(*self.blocks)
        self.columns, self.num_flop_blocks = columns, num_flop_blocks
        self.stem = ParityPatchEmbed(img_size, patch_size, in_chans, embed_dim, columns=columns, **dd)
        equivariant = num_flop_blocks == num_blocks
        self.init_head(head, equivariant, **dd)
        if equivariant:
            self.norm = nn.Identity()
        self.fc_norm = Affine(self.head_hidden_size, **dd) if equivariant else nn.Identity()

    def init_weights(self, nlhb: bool = False) -> None:
        """Initializes weights as timm does, and also affine layers and LayerScales, which timm leaves as they are."""
        super().init_weights(nlhb)
        for module in self.modules():
            if isinstance(module, Affine | BiparityAffine):
                nn.init.ones_(module.alpha)
                nn.init.zeros_(module.beta)
            elif isinstance(module, ResBlock | FlopResBlock):
                nn.init.constant_(module.ls1, self.init_values)
                nn.init.constant_(module.ls2, self.init_values)

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
        if self.skips_odd_half:
            return super().forward_head(self.fc_norm(self.blocks(self.stem(x), invariants_only=True)))
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
        """Features of the selected blocks, as in timm. Those of equivariant blocks are also in raster order."""
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
    """Filters checkpoints of X as timm does; returns those of E and H unchanged."""
    return state_dict if isinstance(model, FlopMlpMixer) else mixer_filter_fn(state_dict, model)


def create_flop_mixer(
    name: str, pretrained: bool, num_flop_blocks: int | None = None, head: str = "even", **kwargs: Any
) -> nn.Module:
    """X, E or H: timm's model if no block is equivariant, else a `FlopMlpMixer`."""
    kwargs = SIZES[baseline_name(name)] | kwargs
    num_flop_blocks = resolve_num_flop_blocks(name, kwargs["num_blocks"], num_flop_blocks)
    check_head(head, num_flop_blocks == kwargs["num_blocks"])
    if num_flop_blocks:
        kwargs |= {"num_flop_blocks": num_flop_blocks, "head": head}
    else:
        refuse_arguments({name: value or None for name, value in kwargs.items()}, FIXED_GRID)
        block_layer = partial(ResBlock, init_values=kwargs.pop("init_values"))
        kwargs = {"norm_layer": Affine, "block_layer": block_layer} | kwargs
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

default_cfgs = make_default_cfgs(SIZES, "EH", first_conv="stem.proj") | make_default_cfgs(
    {name: SIZES[name] for name in OURS}, "X", first_conv="stem.proj"
)

for _name in SIZES:
    register_variants(__name__, _name, "XEH" if _name in OURS else "EH", create_flop_mixer)
