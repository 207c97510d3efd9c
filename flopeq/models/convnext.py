"""Isotropic ConvNeXt as X, E(X) and H(X) (Liu et al. 2022, sec. 3.3; Bökman et al. 2025, sec. 4.3).

timm has ConvNeXt blocks but no isotropic network, so this module also defines X.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from timm.layers import calculate_drop_path_rates
from timm.layers.weight_init import trunc_normal_
from timm.models import build_model_with_cfg, checkpoint, checkpoint_seq
from timm.models._features import feature_take_indices
from timm.models.convnext import ConvNeXtBlock
from torch import Tensor, nn

from flopeq.irreps import SQRT_HALF, change_basis, join, split
from flopeq.layers.conv import FlopDepthwiseConv, FlopPatchConv, check_patch_width, pair
from flopeq.layers.halves import add_residual
from flopeq.layers.mlp import FlopGELU, FlopMlp
from flopeq.layers.norm import FlopLayerNorm
from flopeq.models.variants import (
    BlockSequence,
    FlopHead,
    baseline_name,
    check_num_flop_blocks,
    make_default_cfgs,
    refuse_arguments,
    register_variants,
    resolve_num_flop_blocks,
)

__all__ = ["ConvNeXtIso"]

KERNEL_SIZE = 7

_ISOTROPIC = "all blocks of an isotropic ConvNeXt have one grid and one width"
_FIXED = "the paper's networks have one kind of block"
_BLOCK_ARGUMENTS = ("kernel_sizes", "conv_mlp", "conv_bias", "use_grn", "act_layer", "norm_layer", "norm_eps")

REFUSED: dict[str, str] = {
    "output_stride": f"{_ISOTROPIC}; the stride is patch_size",
    "depths": f"{_ISOTROPIC}; use depth",
    "dims": f"{_ISOTROPIC}; use embed_dim",
    "stem_type": "the stem is a patch embedding",
    "head_norm_first": "the norm follows pooling, as in the paper",
    "head_hidden_size": "the head is one linear layer",
    **dict.fromkeys(_BLOCK_ARGUMENTS, _FIXED),
    "head_init_scale": "the head is initialized like the other layers; scale its parameters after building the model",
    "dynamic_img_size": "there is nothing to turn on; the model takes any image whose sides are multiples of the patch",
}
"""Arguments of timm's `ConvNeXt` that `ConvNeXtIso` does not take, with the reason."""


class FlopConvNeXtBlock(ConvNeXtBlock):
    """timm's ConvNeXt block with layers that commute with the flop (eq. 9).

    Shape: (B, C, H, W) -> (B, C, H, W). With `even_only` the block returns the even half, (B, C/2, H, W).
    Raises: ValueError if C is not a multiple of 4.
    """

    norm: FlopLayerNorm
    mlp: FlopMlp

    def __init__(self, channels: int, ls_init_value: float | None, drop_path: float, device=None, dtype=None) -> None:
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__(
            channels, norm_layer=FlopLayerNorm, ls_init_value=ls_init_value, drop_path=drop_path, mlp_ratio=1, **dd
        )
        self.conv_dw = FlopDepthwiseConv(channels, KERNEL_SIZE, **dd)
        self.mlp = FlopMlp(channels, 4 * channels, act_layer=FlopGELU, **dd)

    def forward(self, x: Tensor, even_only: bool = False) -> Tensor:
        # Flattens the grid, because torch.compile saves (B, H, W, C) activations of training with rows innermost.
        halves, update = (split(y.flatten(2).transpose(1, 2)) for y in (x, self.conv_dw(x)))
        update = self.mlp(self.norm(update), even_only=even_only)
        scales = None if self.gamma is None else split(self.gamma)
        if even_only:
            y = halves[0] + self.drop_path(update if scales is None else scales[0] * update)
        else:
            if scales is not None:
                update = (scales[0] * update[0], scales[1] * update[1])
            y = join(*add_residual(halves, update, self.drop_path))
        return y.transpose(1, 2).unflatten(2, x.shape[-2:])


class BasisChangeBlock(ConvNeXtBlock):
    """The first ordinary block of a hybrid. It first changes its input to the regular basis."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(change_basis(x, dim=1))


def _make_block(index: int, num_flop_blocks: int, channels: int, **kwargs: Any) -> ConvNeXtBlock:
    if index < num_flop_blocks:
        return FlopConvNeXtBlock(channels, **kwargs)
    is_entry = 0 < num_flop_blocks == index
    return (BasisChangeBlock if is_entry else ConvNeXtBlock)(channels, kernel_size=KERNEL_SIZE, **kwargs)


class IsotropicConvNeXt(nn.Module):
    """What all isotropic ConvNeXts share: patches, blocks on one grid, pooling, LayerNorm and a linear classifier.

    A subclass makes the stem and the blocks, calls `init_norm` when `head_hidden_size` is known, and says with
    `invariants` which features the head sees.

    Shape: (B, in_chans, H, W) -> (B, num_classes).
    """

    def __init__(
        self,
        stem: nn.Module,
        blocks: Iterable[nn.Module],
        in_chans: int,
        num_classes: int,
        global_pool: str,
        embed_dim: int,
        patch_size: int | tuple[int, int],
        ls_init_value: float | None,
        drop_rate: float,
        **dd: Any,
    ) -> None:
        super().__init__()
        self._check_pool(global_pool)
        self.num_classes, self.in_chans, self.global_pool = num_classes, in_chans, global_pool
        self.num_features = self.head_hidden_size = self.embed_dim = embed_dim
        self.ls_init_value = ls_init_value
        self.grad_checkpointing = False
        self.stem, self.blocks = stem, BlockSequence(*blocks)
        self.feature_info = [
            {"module": f"blocks.{index}", "num_chs": embed_dim, "reduction": max(pair(patch_size))}
            for index in range(len(self.blocks))
        ]
        self.head_drop = nn.Dropout(drop_rate)
        self.head = nn.Linear(embed_dim, num_classes, **dd) if num_classes > 0 else nn.Identity()

    def init_norm(self, **dd: Any) -> None:
        """Makes the norm before the classifier, and initializes all weights."""
        self.norm = nn.LayerNorm(self.head_hidden_size, eps=1e-6, **dd)
        self.apply(self._init_weights)

    def invariants(self, x: Tensor, dim: int = -1) -> Tensor:
        """The features for the head. `dim` is the channel axis."""
        raise NotImplementedError

    def init_weights(self) -> None:
        """Initializes all parameters again, for example after `to_empty`."""
        for module in self.modules():
            if callable(reset := getattr(module, "reset_parameters", None)):
                reset()
            if isinstance(module, ConvNeXtBlock) and module.gamma is not None:
                nn.init.constant_(module.gamma, self.ls_init_value or 0.0)
        self.apply(self._init_weights)

    @staticmethod
    def _init_weights(module: nn.Module) -> None:
        """Initializes as ConvNeXt does, also the mirrored stem: truncated normal weights, std 0.02, and zero biases."""
        if isinstance(module, nn.Conv2d | nn.Linear):
            trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, FlopPatchConv):
            trunc_normal_(module.even, std=0.02)
            trunc_normal_(module.odd, std=0.02)

    @staticmethod
    def _check_pool(global_pool: str) -> None:
        if global_pool not in ("", "avg"):
            raise ValueError(f"global_pool={global_pool!r} is unknown: use 'avg', or '' for none")

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns of parameter names by layer, for timm's layer-wise learning rate decay."""
        return {"stem": r"^stem", "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))]}

    def no_weight_decay(self) -> set[str]:
        """Names of parameters without weight decay, in addition to biases, norms and LayerScales."""
        return set()

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Turns on recomputing activations in the backward pass instead of keeping them."""
        self.grad_checkpointing = enable

    def get_classifier(self) -> nn.Module:
        """The linear classifier, or nn.Identity if there is none."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replaces the classifier by a new one for `num_classes` classes; 0 removes it and keeps pooling and norm."""
        if global_pool is not None:
            self._check_pool(global_pool)
            self.global_pool = global_pool
        self.num_classes = num_classes
        like = next(self.parameters())
        self.head = (
            nn.Linear(self.head_hidden_size, num_classes, device=like.device, dtype=like.dtype)
            if num_classes > 0
            else nn.Identity()
        )

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> (B, C, H/patch, W/patch)."""
        x = self.stem(x)
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return checkpoint_seq(self.blocks, x)
        return self.blocks(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """(B, C, H, W) -> logits, or the input of the classifier with `pre_logits`."""
        return self._classify(self.invariants(x, dim=1), pre_logits)

    def _classify(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Applies the head to invariant features: to their mean, or at every position if there is no pooling."""
        if self.global_pool:
            x = self.head_drop(self.norm(x.mean((-2, -1))))
            return x if pre_logits else self.head(x)
        x = self.head_drop(self.norm(x.permute(0, 2, 3, 1)))
        return (x if pre_logits else self.head(x)).permute(0, 3, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """The last features, and those of the selected blocks as image grids, (B, C, H, W) each."""
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt={output_fmt!r} is not supported: ConvNeXt's features are 'NCHW'")
        if norm:
            raise ValueError("norm=True is not supported: the final norm acts on pooled features")
        taken, last = feature_take_indices(len(self.blocks), indices)
        x = self.stem(x)
        features = []
        for index, block in enumerate(self.blocks[: last + 1] if stop_early else self.blocks):
            x = checkpoint(block, x) if self.grad_checkpointing and not torch.jit.is_scripting() else block(x)
            if index in taken:
                features.append(x)
        return features if intermediates_only else (x, features)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Removes the blocks after the last selected one. Returns the selected indices."""
        taken, last = feature_take_indices(len(self.blocks), indices)
        self.blocks = self.blocks[: last + 1]
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0, "")
        return taken


class ConvNeXtIso(FlopHead, IsotropicConvNeXt):
    """Isotropic ConvNeXt whose first `num_flop_blocks` blocks commute with the flop: none in X, all in E, some in H.

    The other blocks of H(X), its norm and its head are ordinary and work in the regular basis.

    Args:
        embed_dim: number of channels.
        depth: number of blocks.
        patch_size: kernel size and stride of the stem.
        img_size: only checked against the patch size. The model takes images of any size that fits the patches.
        ls_init_value: initial value of LayerScale; None turns LayerScale off.
        drop_path_rate: stochastic depth rate of the last block; the rate increases linearly from 0.
        head: "even", or "even+abs_odd" to append the absolute values of odd features (E only).
    Shape: (B, in_chans, H, W) -> (B, num_classes).
    Raises: ValueError for widths that do not split into halves and, for E and H, image widths that are not a multiple
    of the patch width.
    """

    def __init__(
        self,
        num_flop_blocks: int = 0,
        head: str = "even",
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 384,
        depth: int = 18,
        ls_init_value: float | None = None,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        check_num_flop_blocks(num_flop_blocks, depth)
        if num_flop_blocks:
            check_patch_width(pair(img_size)[1], pair(patch_size)[1])
            stem = FlopPatchConv(in_chans, embed_dim, patch_size, scale=SQRT_HALF, **dd)
        else:
            stem = nn.Conv2d(in_chans, embed_dim, patch_size, stride=patch_size, **dd)
        blocks = [
            _make_block(index, num_flop_blocks, embed_dim, ls_init_value=ls_init_value, drop_path=rate, **dd)
            for index, rate in enumerate(calculate_drop_path_rates(drop_path_rate, depth))
        ]
        super().__init__(
            stem, blocks, in_chans, num_classes, global_pool, embed_dim, patch_size, ls_init_value, drop_rate, **dd
        )
        self.num_flop_blocks = num_flop_blocks
        self.init_head(head, equivariant=num_flop_blocks == depth, **dd)
        self.init_norm(**dd)

    def forward(self, x: Tensor) -> Tensor:
        if self.skips_odd_half:
            return self._classify(self.blocks(self.stem(x), even_only=True))
        return super().forward(x)


def _create(name: str, pretrained: bool, num_flop_blocks: int | None = None, **kwargs: Any) -> nn.Module:
    refuse_arguments(kwargs, REFUSED)
    kwargs = SIZES[baseline_name(name)] | kwargs
    return build_model_with_cfg(
        ConvNeXtIso,
        name,
        pretrained,
        num_flop_blocks=resolve_num_flop_blocks(name, kwargs["depth"], num_flop_blocks),
        feature_cfg={"out_indices": kwargs.pop("out_indices", 3), "feature_cls": "getter"},
        **kwargs,
    )


SIZES: dict[str, dict[str, Any]] = {
    "convnext_iso_small": {"embed_dim": 384, "depth": 18},
    "convnext_iso_base": {"embed_dim": 768, "depth": 18},
    "convnext_iso_large": {"embed_dim": 1024, "depth": 36, "ls_init_value": 1e-6},
}

default_cfgs = make_default_cfgs(SIZES, "XEH", first_conv="stem")

for _name in SIZES:
    register_variants(__name__, _name, "XEH", _create)
