"""E(ViT) and H(ViT): timm's vision transformer with layers that commute with the flop (Bökman et al. 2025, sec. 4.2).

The baseline X is timm's own DeiT III, `deit3_*`.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from timm.layers import resample_patch_embed
from timm.models import build_model_with_cfg
from timm.models._input import update_model_input_size
from timm.models.vision_transformer import Block, VisionTransformer
from timm.models.vision_transformer import checkpoint_filter_fn as vit_filter_fn
from torch import Tensor, nn

from flopeq.irreps import SQRT_HALF, change_basis, half, join, split
from flopeq.layers.attention import FlopAttention
from flopeq.layers.conv import FlopPatchConv
from flopeq.layers.embed import FlopPatchEmbed, FlopPosEmbed
from flopeq.layers.halves import add_residual, call_unless_identity
from flopeq.layers.mlp import FlopGELU, FlopMlp
from flopeq.layers.norm import FlopLayerNorm, FlopLayerScale
from flopeq.models.variants import (
    FlopHead,
    baseline_name,
    check_head,
    make_default_cfgs,
    refuse_arguments,
    register_variants,
    resolve_num_flop_blocks,
)

__all__ = ["FlopVisionTransformer"]

_FIXED = "E(ViT) and H(ViT) use layers that commute with the flop; num_flop_blocks=0 gives X, which takes it"

REFUSED: dict[str, str] = dict.fromkeys(
    ("embed_layer", "embed_norm_layer", "norm_layer", "act_layer", "block_fn", "mlp_layer", "attn_layer"), _FIXED
)
"""Arguments of timm's `VisionTransformer` that E and H do not take, with the reason."""


class FlopBlock(Block):
    """timm's block with layers that commute with the flop. Inside the block the two halves are separate tensors."""

    def __init__(self, dim: int, *args: Any, init_values: float | None = None, device=None, dtype=None, **kwargs: Any):
        super().__init__(dim, *args, init_values=init_values, device=device, dtype=dtype, **kwargs)
        if init_values:
            self.ls1 = FlopLayerScale(dim, init_values, device=device, dtype=dtype)
            self.ls2 = FlopLayerScale(dim, init_values, device=device, dtype=dtype)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        halves = split(x)
        update = self.attn(self.norm1(halves), attn_mask=attn_mask, is_causal=is_causal)
        halves = add_residual(halves, call_unless_identity(self.ls1, update), self.drop_path1)
        update = self.mlp(self.norm2(halves))
        return join(*add_residual(halves, call_unless_identity(self.ls2, update), self.drop_path2))


FLOP_LAYERS: dict[str, Any] = {
    "norm_layer": FlopLayerNorm,
    "act_layer": FlopGELU,
    "mlp_layer": FlopMlp,
    "attn_layer": FlopAttention,
}
"""The layers of timm's `Block` that commute with the flop."""


class BasisChangeBlock(Block):
    """The first ordinary block of a hybrid. It first changes its input to the regular basis."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        return super().forward(change_basis(x), attn_mask, is_causal)


def _make_block(num_flop_blocks: int, depth: int, dim: int, **kwargs: Any) -> Block:
    """Makes the block with index `depth`: equivariant blocks, then one that changes basis, then ordinary ones."""
    if depth < num_flop_blocks:
        return FlopBlock(dim, depth=depth, **(kwargs | FLOP_LAYERS))
    return (BasisChangeBlock if depth == num_flop_blocks else Block)(dim, depth=depth, **kwargs)


class FlopVisionTransformer(FlopHead, VisionTransformer):
    """A vision transformer whose first `num_flop_blocks` blocks commute with the flop (sec. 4.2).

    If all blocks are equivariant, the model is E(ViT). Its head sees even features only, so the logits of an image and
    its flop are equal. Otherwise it is H(ViT): ordinary blocks, norm and head follow in the regular basis.

    Takes the arguments of timm's `VisionTransformer`, except for those of `REFUSED`, and:
        num_flop_blocks: 1 to depth. For 0 the entry points return timm's model.
        head: "even", or "even+abs_odd" to append the absolute values of odd features (E only).
    Raises: ValueError for widths that do not split into halves, for image widths that are not a multiple of the patch
    width, for attention pooling, and for the arguments of `REFUSED`.
    """

    def __init__(
        self,
        num_flop_blocks: int,
        head: str = "even",
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
        half(embed_dim, "embed_dim")
        if global_pool in ("map", "prr"):
            raise ValueError(f"global_pool={global_pool!r} is not equivariant: use 'token', 'avg', 'max' or 'avgmax'")
        if not no_embed_class:
            raise ValueError("no_embed_class=False gives the class token a position: use True, as DeiT III does")
        equivariant = num_flop_blocks == depth
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
            embed_layer=partial(FlopPatchEmbed, scale=SQRT_HALF),
            norm_layer=FlopLayerNorm if equivariant else partial(nn.LayerNorm, eps=1e-6),
            block_fn=partial(_make_block, num_flop_blocks),  # pyright: ignore[reportArgumentType]
            **dd,
            **{name: value for name, value in kwargs.items() if name not in REFUSED},
        )
        self.num_flop_blocks = num_flop_blocks
        if not isinstance(self.norm_pre, nn.Identity):
            self.norm_pre = FlopLayerNorm(embed_dim, **dd)
        for name in ("cls_token", "reg_token"):
            token = getattr(self, name)
            if token is not None:
                setattr(self, name, nn.Parameter(token.detach()[..., : embed_dim // 2].clone()))
        if self.pos_embed is not None:
            del self.pos_embed
            self.pos_embed = FlopPosEmbed(self.patch_embed.grid_size, embed_dim, **dd)
        self.init_head(head, equivariant, **dd)
        if equivariant and not isinstance(self.fc_norm, nn.Identity):
            self.fc_norm = nn.LayerNorm(self.head_hidden_size, eps=1e-6, **dd)

    def init_weights(self, mode: str = "", needs_reset: bool = True) -> None:
        """Initializes weights as timm does; `FlopPosEmbed` initializes itself."""
        pos_embed = self.pos_embed
        if isinstance(pos_embed, FlopPosEmbed):
            pos_embed.init_weights()
            self.pos_embed = None
        super().init_weights(mode, needs_reset)
        self.pos_embed = pos_embed

    @torch.no_grad()
    def fix_init_weight(self) -> None:
        """Divides the last weights of each residual branch by sqrt(2 * layer), counted from 1, as timm does."""
        for name, parameter in self.blocks.named_parameters():
            index, _, rest = name.partition(".")
            if rest.startswith(("attn.proj.", "mlp.fc2.")) and rest.endswith("weight"):
                parameter.div_((2.0 * (int(index) + 1)) ** 0.5)

    def no_weight_decay(self) -> set[str]:
        return {"pos_embed.even", "pos_embed.odd", "cls_token", "reg_token"}

    def _pos_embed(self, x: Tensor) -> Tensor:
        grid_size = None
        if self.dynamic_img_size:
            grid_size = (x.shape[1], x.shape[2])
            x = x.flatten(1, 2)
        if self.pos_embed is not None:
            x = x + self.pos_embed(grid_size)
        prefixes = [
            join(token, torch.zeros_like(token)).expand(x.shape[0], -1, -1)
            for token in (self.cls_token, self.reg_token)
            if token is not None
        ]
        return self.pos_drop(torch.cat([*prefixes, x], dim=1))

    def set_input_size(self, img_size=None, patch_size=None) -> None:
        """Changes the image or the patch size. The position embedding and the kernels are resampled as in timm."""
        self.patch_embed.set_input_size(img_size, patch_size)
        if self.pos_embed is not None and self.pos_embed.grid_size != self.patch_embed.grid_size:
            self.pos_embed = self.pos_embed.resized(self.patch_embed.grid_size)
        update_model_input_size(self, self.patch_embed.img_size, patch_size=patch_size)

    def pool(self, x: Tensor, pool_type: str | None = None) -> Tensor:
        return super().pool(self.invariants(x), pool_type)


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Resizes position embedding and patches of a checkpoint to those of the model. timm calls it to load weights."""
    if not isinstance(model, FlopVisionTransformer):
        return vit_filter_fn(state_dict, model)  # pyright: ignore[reportArgumentType]
    if "pos_embed.even" in state_dict and model.pos_embed is not None:
        even, odd = state_dict["pos_embed.even"], state_dict["pos_embed.odd"]
        grid_size = (even.shape[0], even.shape[1] + odd.shape[1])
        if grid_size != model.pos_embed.grid_size:
            given = FlopPosEmbed(grid_size, 2 * even.shape[-1])
            given.load_state_dict({"even": even, "odd": odd})
            resized = given.resized(model.pos_embed.grid_size)
            state_dict = state_dict | {"pos_embed.even": resized.even.detach(), "pos_embed.odd": resized.odd.detach()}
    if "patch_embed.proj.even" in state_dict:
        even, odd = state_dict["patch_embed.proj.even"], state_dict["patch_embed.proj.odd"]
        patch_size = (even.shape[2], even.shape[3] + odd.shape[3])
        if patch_size != model.patch_embed.patch_size:
            conv = FlopPatchConv(even.shape[1], 2 * len(even), patch_size, bias=False)
            conv.load_state_dict({"even": even, "odd": odd})
            conv.set_kernel(resample_patch_embed(conv.kernel(), list(model.patch_embed.patch_size)))
            state_dict = state_dict | {f"patch_embed.proj.{name}": part for name, part in conv.state_dict().items()}
    return state_dict


def _create(
    name: str, pretrained: bool, num_flop_blocks: int | None = None, head: str = "even", **kwargs: Any
) -> nn.Module:
    kwargs = SIZES[baseline_name(name)] | kwargs
    num_flop_blocks = resolve_num_flop_blocks(name, kwargs["depth"], num_flop_blocks)
    check_head(head, num_flop_blocks == kwargs["depth"])
    if num_flop_blocks:
        kwargs |= {"num_flop_blocks": num_flop_blocks, "head": head}
    return build_model_with_cfg(
        FlopVisionTransformer if num_flop_blocks else VisionTransformer,
        name,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": kwargs.pop("out_indices", 3), "feature_cls": "getter"},
        **kwargs,
    )


SIZES: dict[str, dict[str, Any]] = {
    "deit3_small_patch16_224": {"patch_size": 16, "embed_dim": 384, "depth": 12, "num_heads": 6},
    "deit3_base_patch16_224": {"patch_size": 16, "embed_dim": 768, "depth": 12, "num_heads": 12},
    "deit3_large_patch16_224": {"patch_size": 16, "embed_dim": 1024, "depth": 24, "num_heads": 16},
    "deit3_huge_patch14_224": {"patch_size": 14, "embed_dim": 1280, "depth": 32, "num_heads": 16},
}

# Every size has no position for the class token, and the authors' initial LayerScale.
SIZES = {name: size | {"no_embed_class": True, "init_values": 1e-4} for name, size in SIZES.items()}

default_cfgs = make_default_cfgs(SIZES, "EH", first_conv="patch_embed.proj")

for _name in SIZES:
    register_variants(__name__, _name, "EH", _create)
