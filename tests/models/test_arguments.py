"""Every argument of timm's constructors has an effect on E and H, or is refused with a reason."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import timm
import torch
from timm.models.convnext import ConvNeXt
from timm.models.mlp_mixer import MlpMixer
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from flopeq.models import convnext, resmlp, vit
from flopeq.registry import MODELS
from flopeq.testing import assert_equivariant, block_errors
from tests.models.conftest import FAMILIES, IMAGE, SMALL, random_images, randomize_parameters

TIMM = {"vit": VisionTransformer, "resmlp": MlpMixer, "convnext_iso": ConvNeXt}

REFUSED = {
    "vit": {**vit.REFUSED, "no_embed_class": "", "dynamic_img_pad": ""},
    "resmlp": resmlp.REFUSED,
    "convnext_iso": convnext.REFUSED,
}

REFUSED_VALUES = {"no_embed_class": False, "dynamic_img_pad": True, "stem_norm": True, "conv_bias": False}

# One value each that differs from the default, and what else the argument needs.
HONOURED: dict[str, dict[str, dict[str, Any]]] = {
    "vit": {
        "img_size": {"img_size": (16, 32)}, "patch_size": {"patch_size": 4}, "in_chans": {"in_chans": 1},
        "num_classes": {"num_classes": 7}, "global_pool": {"global_pool": "avg"}, "embed_dim": {"embed_dim": 32},
        "depth": {"depth": 2}, "num_heads": {"num_heads": 4}, "mlp_ratio": {"mlp_ratio": 2.0},
        "qkv_bias": {"qkv_bias": False}, "qk_norm": {"qk_norm": True}, "scale_attn_norm": {"scale_attn_norm": True},
        "scale_mlp_norm": {"scale_mlp_norm": True}, "proj_bias": {"proj_bias": False},
        "init_values": {"init_values": 0.25}, "class_token": {"class_token": False, "global_pool": "avg"},
        "pos_embed": {"pos_embed": "none"}, "reg_tokens": {"reg_tokens": 2}, "pre_norm": {"pre_norm": True},
        "final_norm": {"final_norm": False}, "fc_norm": {"fc_norm": True},
        "pool_include_prefix": {"pool_include_prefix": True, "global_pool": "avg"},
        "dynamic_img_size": {"dynamic_img_size": True}, "drop_rate": {"drop_rate": 0.5},
        "pos_drop_rate": {"pos_drop_rate": 0.5}, "patch_drop_rate": {"patch_drop_rate": 0.5},
        "proj_drop_rate": {"proj_drop_rate": 0.5}, "attn_drop_rate": {"attn_drop_rate": 0.5},
        "drop_path_rate": {"drop_path_rate": 0.5}, "weight_init": {"weight_init": "jax"},
        "fix_init": {"fix_init": True},
    },
    "resmlp": {
        "num_classes": {"num_classes": 7}, "img_size": {"img_size": (16, 32)}, "in_chans": {"in_chans": 1},
        "patch_size": {"patch_size": 4}, "num_blocks": {"num_blocks": 2}, "embed_dim": {"embed_dim": 32},
        "mlp_ratio": {"mlp_ratio": 2.0}, "drop_rate": {"drop_rate": 0.5}, "proj_drop_rate": {"proj_drop_rate": 0.5},
        "drop_path_rate": {"drop_path_rate": 0.5}, "nlhb": {"nlhb": True}, "global_pool": {"global_pool": ""},
    },
    "convnext_iso": {
        "in_chans": {"in_chans": 1}, "num_classes": {"num_classes": 7}, "global_pool": {"global_pool": ""},
        "ls_init_value": {"ls_init_value": 0.25}, "patch_size": {"patch_size": 4}, "drop_rate": {"drop_rate": 0.5},
        "drop_path_rate": {"drop_path_rate": 0.5},
    },
}  # fmt: skip

CASES = [(family, argument) for family, honoured in HONOURED.items() for argument in honoured]


def model_with(name: str, **args: Any) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, **SMALL[MODELS[name].family] | {"img_size": IMAGE, "patch_size": 8} | args)


def describe(model: nn.Module, image: tuple[int, int], channels: int) -> list[Any]:
    """The modules, the initial weights, and the shape and values of what the model returns."""
    with torch.no_grad():
        result = model.eval()(random_images(image, channels=channels).float())
    return [str(model), {name: value.tolist() for name, value in model.state_dict().items()}, result.tolist()]


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_argument_of_timms_constructor_is_decided_on(family: str) -> None:
    arguments = set(inspect.signature(TIMM[family]).parameters) - {"device", "dtype"}
    honoured, refused = set(HONOURED[family]), set(REFUSED[family])
    assert not honoured & refused
    assert arguments - honoured - refused == set(), "new in timm: honour, or refuse with a reason"
    assert (honoured | refused) - arguments <= {"dynamic_img_size"}, "gone from timm"


@pytest.mark.parametrize("prefix", ["flop_", "flophybrid_"])
@pytest.mark.parametrize(("family", "argument"), CASES)
def test_an_argument_has_an_effect_and_keeps_the_law(family: str, argument: str, prefix: str) -> None:
    name, args = prefix + FAMILIES[family], HONOURED[family][argument]
    without = {key: value for key, value in args.items() if key != argument}
    if argument == "class_token":
        without |= {"global_pool": "avg"}
    model, plain = model_with(name, **args), model_with(name, **without)
    image = (24, 40) if argument == "dynamic_img_size" else args.get("img_size", IMAGE)
    channels = args.get("in_chans", 3)
    if argument == "dynamic_img_size":
        with pytest.raises(AssertionError, match="Input height"):
            plain(random_images(image).float())
    elif argument not in ("img_size", "in_chans"):
        assert describe(model, image, channels) != describe(plain, image, channels)
    model, images = randomize_parameters(model.double()).eval(), random_images(image, channels=channels)
    tol = 1e-6 if argument == "dynamic_img_size" else 1e-10  # timm resamples positions in float32
    if argument == "global_pool" and args[argument] == "":
        assert max(block_errors(model, images).values()) < tol or prefix == "flophybrid_"
    elif prefix == "flop_":
        assert_equivariant(model, images, tol)
    errors = block_errors(model, images)
    assert all(error < tol for block, error in errors.items() if block in ("blocks.0",))
    assert "blocks.0" in errors


@pytest.mark.parametrize("prefix", ["flop_", "flophybrid_"])
@pytest.mark.parametrize(("family", "argument"), [(f, argument) for f in REFUSED for argument in REFUSED[f]])
def test_an_argument_that_does_not_fit_is_refused(family: str, argument: str, prefix: str) -> None:
    with pytest.raises(ValueError, match=argument):
        model_with(prefix + FAMILIES[family], **{argument: REFUSED_VALUES.get(argument, "layernorm")})


@pytest.mark.parametrize("argument", ["dynamic_img_size", "dynamic_img_pad"])
@pytest.mark.parametrize("name", ["resmlp_base_24_224", "flop_resmlp_24_224", "flophybrid_resmlp_24_224"])
def test_a_resmlp_has_one_grid(name: str, argument: str) -> None:
    with pytest.raises(ValueError, match="token mixing has a weight for every pair of tokens"):
        model_with(name, **{argument: True})
    with pytest.raises(AssertionError, match=r"Input width \(32\) doesn't match model \(24\)"):
        model_with(name)(torch.zeros(1, 3, 16, 32))


def test_mlp_ratio_of_a_mixer_is_refused() -> None:
    with pytest.raises(ValueError, match="not a number"):
        model_with("flop_resmlp_24_224", mlp_ratio=(0.5, 4.0))


def test_layers_of_x_can_be_chosen() -> None:
    assert isinstance(model_with("resmlp_base_24_224", norm_layer=nn.LayerNorm).norm, nn.LayerNorm)
    args = {"num_flop_blocks": 0, "act_layer": "relu"}
    assert isinstance(model_with("flop_deit3_base_patch16_224", **args).blocks[0].mlp.act, nn.ReLU)


def test_fix_init_divides_the_last_weights_of_each_branch() -> None:
    for name in ("flop_deit3_base_patch16_224", "flophybrid_deit3_base_patch16_224"):
        plain, fixed = model_with(name), model_with(name, fix_init=True)
        for key, value in plain.state_dict().items():
            block = int(key.split(".")[1]) + 1 if ".attn.proj." in key or ".mlp.fc2." in key else 0
            scale = (2 * block) ** 0.5 if block and key.endswith("weight") else 1.0
            torch.testing.assert_close(fixed.state_dict()[key], value / scale)


@pytest.mark.parametrize("name", [
    prefix + name for name in FAMILIES.values() for prefix in ("flop_", "flophybrid_")
] + ["convnext_iso_base"])  # fmt: skip
def test_a_model_from_the_meta_device_is_initialized(name: str) -> None:
    fresh = model_with(name, num_classes=5).state_dict()
    with torch.device("meta"):
        model = model_with(name, num_classes=5)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
    model.init_weights()
    for key, found in model.state_dict().items():
        expected = fresh[key]
        if expected.min() == expected.max():
            assert torch.equal(found, expected), key
        else:
            assert 0.3 < found.square().mean().sqrt() / expected.square().mean().sqrt() < 3, key
    assert model.eval()(random_images().float()).isfinite().all()
