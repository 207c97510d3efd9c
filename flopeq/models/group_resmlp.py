"""ResMLPs that commute with more than the flop: C2 x C2 (flop and flip), D4 (octic), and graded ones.

`mirrors_<X>` and `octic_<X>` are the equivariant networks, `mirrorshybrid_<X>` and `octichybrid_<X>` their hybrids.
All four take `symmetry`, such as "d4:12,c2:12", which gives every block its group. A network without a group beyond C2
is the one of `flopeq.models.resmlp`.

Between the blocks, channels are in the irreps of a block's group, and tokens in the order of its places (see
`flopeq.layers.group.tokens`). Only token mixing changes tokens to irreps.

Shape suffixes: B batch, N tokens, C channels, H W grid.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from einops import rearrange
from timm.models import build_model_with_cfg
from timm.models._features import feature_take_indices
from timm.models.mlp_mixer import Affine, MlpMixer, ResBlock
from torch import Tensor, nn

from flopeq.groups import C2, TRIVIAL, Group
from flopeq.layers.conv import pair
from flopeq.layers.group.embed import GroupPatchEmbed
from flopeq.layers.group.mixing import GroupGridAffine, GroupResBlock
from flopeq.layers.group.tokens import GridTokens, ReorderTokens, RestrictFeatures
from flopeq.models.resmlp import FIXED_GRID, REFUSED, SIZES, create_flop_mixer
from flopeq.models.symmetry import (
    GroupHead,
    block_groups,
    check_group_head,
    flop_arguments,
    format_symmetry,
    parse_symmetry,
)
from flopeq.models.variants import baseline_name, make_default_cfgs, refuse_arguments, register_variants
from flopeq.registry import GROUP_VARIANTS

__all__ = ["GroupMlpMixer"]


class RestrictingGroupResBlock(GroupResBlock):
    """The first block of a smaller group."""

    def __init__(self, restriction: RestrictFeatures, *args: Any, **kwargs: Any) -> None:
        super().__init__(restriction.target, *args, **kwargs)
        self.restriction = restriction

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.restriction(x))


class RestrictingResBlock(ResBlock):
    """The first ordinary block. It changes channels to the regular basis and tokens to raster order."""

    def __init__(self, restriction: RestrictFeatures, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.restriction = restriction

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.restriction(x))


class PlacesPatchEmbed(GroupPatchEmbed):
    """Patch embedding with tokens in the order of a group's places."""

    def __init__(self, raster: GridTokens, tokens: GridTokens, *args: Any, device=None, **kwargs: Any) -> None:
        super().__init__(tokens.group, *args, device=device, **kwargs)
        self.reorder = ReorderTokens(raster, tokens, device)

    def forward(self, image: Tensor) -> Tensor:
        return self.reorder(super().forward(image))


class GroupMlpMixer(GroupHead, MlpMixer):
    """A ResMLP each of whose blocks commutes with a group. The groups shrink with the depth.

    The first group is that of the patch embedding. Where the group changes, the features are restricted to the next one
    by a fixed orthogonal change of channels. The logits are invariant under the last block's group. After ordinary
    blocks nothing is promised of them.

    Takes the arguments of timm's `MlpMixer`, except for those of `flopeq.models.resmlp.REFUSED`, and:
        symmetry: the groups of the blocks, as `parse_symmetry` reads them.
        init_values: initial value of LayerScale.
        head: "trivial" for the pairs of equal irreps of channels and tokens, C/|G| features. "power" appends the
            absolute values of channels in the other irreps, and the norm over the rows of a two-dimensional irrep. The
            default is that of `GroupHead`.
    `forward_features` returns tokens in the order of the last group's places. `forward_intermediates` and
    `features_only` return image grids of irreps.
    Raises: ValueError for widths that do not split into the group's parts, for images that the group does not act on
    (D4 needs square ones), and for the arguments of `REFUSED`.
    """

    def __init__(
        self,
        symmetry: str,
        head: str | None = None,
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
        if not isinstance(mlp_ratio, int | float):
            raise ValueError(f"mlp_ratio={mlp_ratio!r} is not a number: ResMLP's blocks have one channel MLP")
        groups = parse_symmetry(symmetry, num_blocks)
        groups[0].multiplicity(embed_dim, "embed_dim")
        self.init_values = init_values  # timm's constructor calls init_weights
        height, width = (side // patch for side, patch in zip(pair(img_size), pair(patch_size), strict=True))
        tokens = {group: GridTokens(group, (height, width)) for group in (*groups, TRIVIAL)}
        super().__init__(
            num_classes=num_classes,
            img_size=img_size,  # pyright: ignore[reportArgumentType]
            in_chans=in_chans,
            patch_size=patch_size,  # pyright: ignore[reportArgumentType]
            num_blocks=num_blocks,
            embed_dim=embed_dim,
            mlp_ratio=mlp_ratio,  # pyright: ignore[reportArgumentType]
            block_layer=_block_factory(groups, tokens, init_values),  # pyright: ignore[reportArgumentType]
            norm_layer=Affine,
            **dd,
            **{name: value for name, value in kwargs.items() if name not in REFUSED | FIXED_GRID},
        )
        self.block_groups, self.grid_size = groups, (height, width)
        raster, last = tokens[TRIVIAL], tokens[groups[-1]]
        self.stem = PlacesPatchEmbed(raster, tokens[groups[0]], img_size, patch_size, in_chans, embed_dim, **dd)
        self.to_raster = nn.ModuleDict({group.name: ReorderTokens(tokens[group], raster, device) for group in groups})
        self.last_tokens = last
        self.init_group_head(head, last.group, **dd)
        if last.group is not TRIVIAL:
            self.norm = nn.Identity()
        self.fc_norm = nn.Identity() if last.group is TRIVIAL else Affine(self.head_hidden_size, **dd)

    def init_weights(self, nlhb: bool = False) -> None:
        """Initializes weights as timm does, and also affine layers and LayerScales, which timm leaves as they are."""
        super().init_weights(nlhb)
        for module in self.modules():
            if isinstance(module, Affine | GroupGridAffine):
                nn.init.ones_(module.alpha)
                nn.init.zeros_(module.beta)
            elif isinstance(module, ResBlock | GroupResBlock):
                nn.init.constant_(module.ls1, self.init_values)
                nn.init.constant_(module.ls2, self.init_values)

    def invariants(self, x: Tensor, dim: int = -1) -> Tensor:
        if self.head_group is TRIVIAL:
            return x
        pairs = self.last_tokens.invariants(self.last_tokens.to_irreps(x))
        if self.head_kind == "trivial":
            return pairs
        norms = super().invariants(x)[..., pairs.shape[-1] :]
        return torch.cat((pairs, norms), -1)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        return super().forward_head(self.fc_norm(self.invariants(x)), pre_logits)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Features of the selected blocks, as in timm, in raster order."""
        taken, _ = feature_take_indices(len(self.blocks), indices)
        final, features = super().forward_intermediates(x, indices, norm, stop_early, output_fmt="NLC")
        features = [
            self.to_raster[self.block_groups[index].name](feature)
            for index, feature in zip(taken, features, strict=True)
        ]
        if output_fmt == "NCHW":
            features = [rearrange(feature, "B (H W) C -> B C H W", H=self.grid_size[0]) for feature in features]
        return features if intermediates_only else (final, features)


def _block_factory(groups: Sequence[Group], tokens: dict[Group, GridTokens], init_values: float) -> Any:
    """A function that timm's constructor calls for each block in turn."""
    depth = itertools.count()

    def block(
        dim: int, seq_len: int, mlp_ratio: float, drop: float, drop_path: float, device=None, dtype=None, **layers: Any
    ) -> nn.Module:
        index = next(depth)
        group, before = groups[index], groups[max(index - 1, 0)]
        shared = {"init_values": init_values, "drop": drop, "drop_path": drop_path, "device": device, "dtype": dtype}
        if group is before:
            if group is TRIVIAL:
                return ResBlock(dim, seq_len, mlp_ratio, **layers, **shared)
            return GroupResBlock(tokens[group], dim, mlp_ratio, **shared)
        restriction = RestrictFeatures(tokens[before], tokens[group], device)
        if group is TRIVIAL:
            return RestrictingResBlock(restriction, dim, seq_len, mlp_ratio, **layers, **shared)
        return RestrictingGroupResBlock(restriction, dim, mlp_ratio, **shared)

    return block


def _create(
    name: str,
    pretrained: bool,
    symmetry: str | None = None,
    num_group_blocks: int | None = None,
    head: str | None = None,
    **kwargs: Any,
) -> nn.Module:
    kwargs = SIZES[baseline_name(name)] | kwargs
    groups = block_groups(name, kwargs["num_blocks"], symmetry, num_group_blocks)
    check_group_head(head, groups[-1])
    if groups[0] in (C2, TRIVIAL):
        return create_flop_mixer(name, pretrained, **flop_arguments(groups, head), **kwargs)
    return build_model_with_cfg(
        GroupMlpMixer,
        name,
        pretrained,
        feature_cfg={"out_indices": kwargs.pop("out_indices", 3), "feature_cls": "getter"},
        symmetry=format_symmetry(groups),
        head=head,
        **kwargs,
    )


default_cfgs = make_default_cfgs(SIZES, GROUP_VARIANTS, first_conv="stem.proj")

for _name in SIZES:
    register_variants(__name__, _name, GROUP_VARIANTS, _create)
