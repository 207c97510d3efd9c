"""What people do with a model of timm: copies, low precision, memory formats, image sizes, layer decay."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from timm.optim import create_optimizer_v2

from flopeq.registry import MODELS
from flopeq.testing import assert_equivariant, block_errors
from tests.models.conftest import FAMILIES, random_images, small_model

NAMES = [prefix + name for name in FAMILIES.values() for prefix in ("flop_", "flophybrid_")]

VITS = [name for name in NAMES if MODELS[name].family == "vit"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))],
                         ids=["deepcopy", "pickle"])  # fmt: skip
def test_a_copy_computes_the_same_and_is_independent(name: str, duplicate) -> None:
    model, x = small_model(name), random_images()
    expected, other = model(x), duplicate(model)
    assert torch.equal(other(x), expected)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert torch.equal(model(x), expected) and not other(x).any()


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_weights_compute_in_bfloat16(name: str) -> None:
    model, x = small_model(name), random_images()
    expected, found = model(x), model.to(torch.bfloat16)(x.to(torch.bfloat16))
    assert found.dtype == torch.bfloat16
    assert (found.double() - expected).abs().max() < 0.1 * expected.abs().max()


@pytest.mark.parametrize("name", NAMES)
def test_channels_last_computes_the_same(name: str) -> None:
    model, x = small_model(name), random_images()
    expected = model(x)
    found = model.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", NAMES)
def test_images_and_patches_need_not_be_square(name: str) -> None:
    image = (24, 16)
    model = small_model(name, image, patch_size=(12, 4))
    assert model.forward_intermediates(random_images(image))[1][0].shape == (2, 16, 2, 4)
    if name.startswith("flop_"):
        assert_equivariant(model, random_images(image))
    assert block_errors(model, random_images(image))["blocks.0"] < 1e-10


@pytest.mark.parametrize(("name", "args"), [(name, {"dynamic_img_size": True}) for name in VITS] + [
    (name, {}) for name in NAMES if MODELS[name].family == "convnext_iso"
])  # fmt: skip
def test_images_of_other_sizes(name: str, args: dict) -> None:
    model, x = small_model(name, **args), random_images((24, 40))
    assert model(x).shape == (2, 5)
    assert block_errors(model, x)["blocks.0"] < 1e-6  # timm resamples positions in float32
    if name.startswith("flop_"):
        assert_equivariant(model, x, tol=1e-6)
    with pytest.raises((ValueError, AssertionError), match=r"width .*20.* (not a multiple of|divisible by)"):
        model(random_images((24, 20)))


@pytest.mark.parametrize("name", VITS)
def test_register_tokens_are_even(name: str) -> None:
    model, x = small_model(name, reg_tokens=2), random_images()
    assert model.reg_token.shape == (1, 2, 8) and model.num_prefix_tokens == 3
    tokens = model.forward_intermediates(x, indices=[0], return_prefix_tokens=True, intermediates_only=True)[0][1]
    of_flop = model.forward_intermediates(x.flip(-1), indices=[0], return_prefix_tokens=True, intermediates_only=True)
    even, odd = tokens.chunk(2, -1)
    torch.testing.assert_close(of_flop[0][1], torch.cat((even, -odd), -1))
    assert odd.abs().max() > 1e-3
    x = model.forward_features(x)
    assert x.shape == (2, 3 + 6, 16)


@pytest.mark.parametrize("name", NAMES)
def test_layer_decay_halves_the_learning_rate_of_each_block(name: str) -> None:
    model = small_model(name)
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1.0, weight_decay=0.1, layer_decay=0.5)
    scales = {}
    names = {id(parameter): key for key, parameter in model.named_parameters()}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            scales[names.pop(id(parameter))] = group["lr_scale"]
    assert not names
    for key, scale in scales.items():
        if key.startswith("blocks."):
            assert scale == 0.5 ** (3 - int(key.split(".")[1])), key
        elif key.startswith(("patch_embed", "stem", "pos_embed", "cls_token")):
            assert scale == 0.5**4, key
        else:  # timm puts the last norm into the layer of the last block
            assert scale == (0.5 if key.startswith("norm.") else 1), key
