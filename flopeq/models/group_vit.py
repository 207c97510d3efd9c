"""Vision transformers that commute with more than the flop: C2 x C2 (flop and flip), D4 (octic), and graded ones.

`mirrors_<X>` and `octic_<X>` are the equivariant networks, `mirrorshybrid_<X>` and `octichybrid_<X>` their hybrids.
All four take `symmetry`, such as "d4:4,c2:8", which gives every block its group. A network without a group beyond C2 is
the one of `flopeq.models.vit`.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath, resample_patch_embed
from timm.models import build_model_with_cfg
from timm.models.vision_transformer import Block, VisionTransformer
from timm.models.vision_transformer import checkpoint_filter_fn as vit_filter_fn
from torch import Tensor, nn

from flopeq.groups import C2, TRIVIAL, Group
from flopeq.irreps import SQRT_HALF
from flopeq.layers.group.attention import GroupAttention
from flopeq.layers.group.conv import GroupPatchConv
from flopeq.layers.group.embed import GroupPatchEmbed, GroupPosEmbed
from flopeq.layers.group.mlp import GroupMlp
from flopeq.layers.group.norm import GroupLayerNorm, GroupLayerScale
from flopeq.layers.group.orbits import size_of_fields
from flopeq.layers.group.parts import add_residual
from flopeq.layers.halves import call_unless_identity
from flopeq.models.octic_vits import OcticVits, check_octic_vits, make_octic_block
from flopeq.models.symmetry import (
    GroupHead,
    RestrictsFirst,
    block_groups,
    check_group_head,
    flop_arguments,
    format_symmetry,
    parse_symmetry,
)
from flopeq.models.variants import baseline_name, make_default_cfgs, refuse_arguments, register_variants
from flopeq.models.vit import FLOP_LAYERS, REFUSED, SIZES, FlopBlock, FlopVisionTransformer
from flopeq.models.vit import checkpoint_filter_fn as flop_filter_fn
from flopeq.registry import GROUP_VARIANTS

__all__ = ["GroupVisionTransformer"]


class GroupBlock(nn.Module):
    """timm's `Block` with layers that commute with a group. Inside the block the parts are separate tensors."""

    def __init__(
        self,
        group: Group,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        qk_norm: bool = False,
        scale_attn_norm: bool = False,
        scale_mlp_norm: bool = False,
        proj_bias: bool = True,
        proj_drop: float = 0.0,
        attn_drop: float = 0.0,
        init_values: float | None = None,
        drop_path: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        norm_layer = partial(GroupLayerNorm, group)
        self.group = group
        self.norm1 = norm_layer(dim, **dd)
        self.attn = GroupAttention(
            group, dim, num_heads, qkv_bias, qk_norm, scale_attn_norm, proj_bias, attn_drop, proj_drop, norm_layer, **dd
        )
        self.ls1 = GroupLayerScale(group, dim, init_values, **dd) if init_values else nn.Identity()
        self.drop_path1 = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm2 = norm_layer(dim, **dd)
        self.mlp = GroupMlp(
            group, dim, int(dim * mlp_ratio), norm_layer=norm_layer if scale_mlp_norm else None, bias=proj_bias,
            drop=proj_drop, **dd,
        )  # fmt: skip
        self.ls2 = GroupLayerScale(group, dim, init_values, **dd) if init_values else nn.Identity()
        self.drop_path2 = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        parts = self.group.split(x)
        update = self.attn(self.norm1(parts), attn_mask=attn_mask, is_causal=is_causal)
        parts = add_residual(self.group, parts, call_unless_identity(self.ls1, update), self.drop_path1)
        update = self.mlp(self.norm2(parts))
        parts = add_residual(self.group, parts, call_unless_identity(self.ls2, update), self.drop_path2)
        return self.group.join(parts)


class RestrictingGroupBlock(RestrictsFirst, GroupBlock):
    """The first block of C2 x C2 after blocks of D4."""


class RestrictingFlopBlock(RestrictsFirst, FlopBlock):
    """The first block of C2 after blocks of a larger group."""


class RestrictingBlock(RestrictsFirst, Block):
    """The first ordinary block. It restricts to the trivial group, which is the change to the regular basis."""


def _make_block(groups: tuple[Group, ...], depth: int, dim: int, **kwargs: Any) -> nn.Module:
    """Makes the block with index `depth`. Blocks of C2 are those of E(ViT)."""
    group, before = groups[depth], groups[max(depth - 1, 0)]
    restricts = group is not before
    if group is TRIVIAL:
        block = (RestrictingBlock if restricts else Block)(dim, depth=depth, **kwargs)
    elif group is C2:
        block = (RestrictingFlopBlock if restricts else FlopBlock)(dim, depth=depth, **(kwargs | FLOP_LAYERS))
    else:
        given = {name: value for name, value in kwargs.items() if name not in FLOP_LAYERS}
        block = (RestrictingGroupBlock if restricts else GroupBlock)(group, dim, **given)
    if isinstance(block, RestrictsFirst):
        block.group_before, block.group = before, group
    return block


class GroupVisionTransformer(GroupHead, VisionTransformer):
    """A vision transformer each of whose blocks commutes with a group. The groups shrink with the depth.

    The first group is that of the embeddings. Where the group changes, the features are restricted to the next one by a
    fixed orthogonal change of channels. The logits are invariant under the last block's group. After ordinary blocks
    nothing is promised of them.

    Takes the arguments of timm's `VisionTransformer`, except for those of `flopeq.models.vit.REFUSED`, and:
        symmetry: the groups of the blocks, as `parse_symmetry` reads them.
        head: "trivial" or "power", see `GroupHead`.
        octic_vits: "hybrid" or "invariant" for weights of octic-vits, see `flopeq.models.octic_vits`.
    Raises: ValueError for widths that do not split into the group's parts, for images that the group does not act on
    (D4 needs square ones), for attention pooling, and for the arguments of `REFUSED`.
    """

    def __init__(
        self,
        symmetry: str,
        head: str | None = None,
        octic_vits: OcticVits | None = None,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 768,
        depth: int = 12,
        global_pool: str = "token",
        init_values: float | None = 1e-4,
        no_embed_class: bool = True,
        pos_embed: str = "learn",
        device=None,
        dtype=None,
        **kwargs: Any,
    ) -> None:
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        refuse_arguments(kwargs, REFUSED)
        groups = parse_symmetry(symmetry, depth)
        first, last = groups[0], groups[-1]
        block_fn = partial(_make_block, groups)
        if octic_vits is not None:
            check_octic_vits(octic_vits, groups)
            block_fn = partial(make_octic_block, octic_vits, groups, block_fn)
        first.multiplicity(embed_dim, "embed_dim")
        if global_pool in ("map", "prr"):
            raise ValueError(f"global_pool={global_pool!r} is not equivariant: use 'token', 'avg', 'max' or 'avgmax'")
        if not no_embed_class:
            raise ValueError("no_embed_class=False gives the class token a position: use True, as DeiT III does")
        super().__init__(
            img_size=img_size,
            in_chans=in_chans,
            num_classes=num_classes,
            embed_dim=embed_dim,
            depth=depth,
            global_pool=global_pool,  # pyright: ignore[reportArgumentType]
            init_values=init_values,
            no_embed_class=True,
            pos_embed=pos_embed,
            embed_layer=partial(GroupPatchEmbed, first, scale=SQRT_HALF),
            norm_layer=partial(nn.LayerNorm, eps=1e-6),
            block_fn=block_fn,  # pyright: ignore[reportArgumentType]
            **dd,
            **{name: value for name, value in kwargs.items() if name not in REFUSED},
        )
        self.block_groups = groups
        self.logit_group = first if octic_vits == "invariant" else last
        if not isinstance(self.norm_pre, nn.Identity):
            self.norm_pre = GroupLayerNorm(first, embed_dim, **dd)
        if last is not TRIVIAL and not isinstance(self.norm, nn.Identity):
            self.norm = GroupLayerNorm(last, embed_dim, **dd)
        for name in ("cls_token", "reg_token"):
            token = getattr(self, name)
            if token is not None:
                setattr(self, name, nn.Parameter(token.detach()[..., : embed_dim // first.order].clone()))
        if self.pos_embed is not None:
            del self.pos_embed
            self.pos_embed = GroupPosEmbed(first, self.patch_embed.grid_size, embed_dim, **dd)
        self.init_group_head(head, last, **dd)
        if last is not TRIVIAL and not isinstance(self.fc_norm, nn.Identity):
            self.fc_norm = nn.LayerNorm(self.head_hidden_size, eps=1e-6, **dd)

    def init_weights(self, mode: str = "", needs_reset: bool = True) -> None:
        """Initializes weights as timm does; `GroupPosEmbed` initializes itself."""
        pos_embed = self.pos_embed
        if isinstance(pos_embed, GroupPosEmbed):
            pos_embed.init_weights()
            self.pos_embed = None
        super().init_weights(mode, needs_reset)
        self.pos_embed = pos_embed

    fix_init_weight = FlopVisionTransformer.fix_init_weight

    set_input_size = FlopVisionTransformer.set_input_size

    def no_weight_decay(self) -> set[str]:
        names = {f"pos_embed.{irrep.name}" for irrep in self.block_groups[0].irreps}
        return names | {"cls_token", "reg_token"}

    def _pos_embed(self, x: Tensor) -> Tensor:
        grid_size = None
        if self.dynamic_img_size:
            grid_size = (x.shape[1], x.shape[2])
            x = x.flatten(1, 2)
        if self.pos_embed is not None:
            x = x + self.pos_embed(grid_size)
        # The tokens beside the image are invariant: only their first irrep is not zero.
        prefixes = [
            F.pad(token, (0, self.embed_dim - token.shape[-1])).expand(x.shape[0], -1, -1)
            for token in (self.cls_token, self.reg_token)
            if token is not None
        ]
        return self.pos_drop(torch.cat([*prefixes, x], dim=1))

    def pool(self, x: Tensor, pool_type: str | None = None) -> Tensor:
        return super().pool(self.invariants(x), pool_type)


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Resizes position embedding and patches of a checkpoint to those of the model. timm calls it to load weights.

    Free values do not say of which grid they are. Of several possible grids, the most nearly square one is taken.
    """
    if isinstance(model, FlopVisionTransformer):
        return flop_filter_fn(state_dict, model)
    if not isinstance(model, GroupVisionTransformer):
        return vit_filter_fn(state_dict, model)  # pyright: ignore[reportArgumentType]
    group = model.block_groups[0]
    names = [irrep.name for irrep in group.irreps]
    positions = {name: state_dict.get(f"pos_embed.{name}") for name in names}
    if model.pos_embed is not None and (free := _all_tensors(positions)):
        grid_size = size_of_fields(group, tuple(len(values) for values in free.values()))
        if grid_size != model.pos_embed.grid_size:
            given = GroupPosEmbed(group, grid_size, model.embed_dim)
            given.load_state_dict(free)
            resized = given.resized(model.pos_embed.grid_size).state_dict()
            state_dict = state_dict | {f"pos_embed.{name}": values for name, values in resized.items()}
    kernels = {name: state_dict.get(f"patch_embed.proj.{name}") for name in names}
    if free := _all_tensors(kernels):
        patch_size = size_of_fields(group, tuple(values.shape[-1] for values in free.values()))
        if patch_size != model.patch_embed.patch_size:
            conv = GroupPatchConv(group, free[names[0]].shape[1], model.embed_dim, patch_size, bias=False)
            conv.load_state_dict(free)
            conv.set_kernel(resample_patch_embed(conv.kernel(), list(model.patch_embed.patch_size)))
            state_dict = state_dict | {f"patch_embed.proj.{name}": part for name, part in conv.state_dict().items()}
    return state_dict


def _all_tensors(found: dict[str, Tensor | None]) -> dict[str, Tensor]:
    """The given tensors, or {} if one is missing."""
    tensors = {name: value for name, value in found.items() if value is not None}
    return tensors if len(tensors) == len(found) else {}


def _create(
    name: str,
    pretrained: bool,
    symmetry: str | None = None,
    num_group_blocks: int | None = None,
    head: str | None = None,
    **kwargs: Any,
) -> nn.Module:
    kwargs = SIZES[baseline_name(name)] | kwargs
    groups = block_groups(name, kwargs["depth"], symmetry, num_group_blocks)
    check_group_head(head, groups[-1])
    if groups[0] is TRIVIAL:
        model_class = VisionTransformer
    elif groups[0] is C2:
        model_class = FlopVisionTransformer
        kwargs |= flop_arguments(groups, head)
    else:
        model_class = GroupVisionTransformer
        kwargs |= {"symmetry": format_symmetry(groups), "head": head}
    return build_model_with_cfg(
        model_class,
        name,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": kwargs.pop("out_indices", 3), "feature_cls": "getter"},
        **kwargs,
    )


default_cfgs = make_default_cfgs(SIZES, GROUP_VARIANTS, first_conv="patch_embed.proj")

for _name in SIZES:
    register_variants(__name__, _name, GROUP_VARIANTS, _create)
