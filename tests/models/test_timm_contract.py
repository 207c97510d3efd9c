"""What timm and torchvision expect of a model: its default_cfg, FX, and checkpoints of other input channels."""

from __future__ import annotations

import pytest
import timm
import torch
from timm.models import adapt_input_conv
from timm.models import create_feature_extractor as timm_feature_extractor
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor

from flopeq.layers import FlopPatchConv
from flopeq.models.build import build
from flopeq.registry import MODELS
from flopeq.testing import assert_equivariant
from tests.models.conftest import EQUIVARIANT, FAMILIES, IMAGE, OURS, SMALL, random_images, small_model

OURS_IN_TIMM = [name for name in OURS if timm.models.model_entrypoint(name).__module__.startswith("flopeq.")]

PAIRS = [prefix + name for name in FAMILIES.values() for prefix in ("flop_", "flophybrid_")]

BASELINES = ["resmlp_base_24_224", "convnext_iso_base"]

POOLS = {"vit": ("token", "avg", "max", "avgmax", ""), "resmlp": ("avg", ""), "convnext_iso": ("avg", "")}


@pytest.mark.parametrize("name", OURS_IN_TIMM)
def test_default_cfgs_name_the_first_convolution_the_grid_and_the_head(name: str) -> None:
    cfg, model = timm.get_pretrained_cfg(name).to_dict(), build(name, device="meta")
    first = model.get_submodule(cfg["first_conv"])
    assert isinstance(first, nn.Conv2d if name in BASELINES or MODELS[name].variant == "X" else FlopPatchConv)
    assert isinstance(model.get_submodule(cfg["classifier"]), nn.Linear)
    assert cfg["pool_size"] == ((16, 16) if "patch14" in name else (14, 14))
    with torch.device("meta"):
        _, [grid] = model.eval().forward_intermediates(torch.empty(1, *cfg["input_size"]), indices=[0])
    assert grid.shape[2:] == cfg["pool_size"]


@pytest.mark.parametrize("head", ["even", "even+abs_odd"])
@pytest.mark.parametrize("name", [*PAIRS, *BASELINES])
def test_widths_are_those_of_features_and_of_the_heads_input(name: str, head: str) -> None:
    equivariant = name in EQUIVARIANT
    if not equivariant and head != "even":
        pytest.skip("the option is of E")
    x, half = random_images(), 8 if equivariant and head == "even" else 16
    family = MODELS[name].family
    for pool in POOLS[family]:
        model = small_model(name, head=head, global_pool=pool)
        channels = 1 if family == "convnext_iso" else -1
        features = model.forward_features(x)
        assert features.shape[channels] == model.num_features == 16
        shape = model.forward_head(features, pre_logits=True).shape
        assert shape[channels] == model.head_hidden_size == half
        assert len(shape) == (2 if pool else features.ndim)
        assert model(x).shape == ((*shape[:1], 5, *shape[2:]) if channels == 1 else (*shape[:-1], 5))
        model.reset_classifier(0)
        assert model(x).shape == shape
        model.reset_classifier(0, "")
        assert model(x).shape[channels] == half and model(x).ndim == features.ndim


def test_logits_of_unpooled_convnext_are_a_map_that_the_flop_mirrors() -> None:
    model, x = small_model("flop_convnext_iso_base", global_pool=""), random_images()
    logits = model(x)
    assert logits.shape == (2, 5, 2, 3)
    torch.testing.assert_close(model(x.flip(-1)), logits.flip(-1))
    torch.testing.assert_close(model.head(model.norm(model.forward_features(x)[:, :8, 1, 2])), logits[..., 1, 2])


@pytest.mark.parametrize("extractor", [create_feature_extractor, timm_feature_extractor], ids=["torchvision", "timm"])
@pytest.mark.parametrize("name", [*PAIRS, *BASELINES])
def test_fx_extracts_the_features_of_a_block_and_the_logits(name: str, extractor) -> None:
    model, x, seen = small_model(name), random_images(), []
    extracted = extractor(model, ["blocks.1", "head"])(x)
    torch.testing.assert_close(extracted["head"], model(x))
    model.blocks[1].register_forward_hook(lambda module, args, result: seen.append(result))
    model.forward_features(x)
    torch.testing.assert_close(extracted["blocks.1"], seen[0])


@pytest.mark.parametrize("name", PAIRS)
def test_fx_graphs_train(name: str) -> None:
    model, x = small_model(name, drop_path_rate=1e-9).train(), random_images()
    torch.fx.symbolic_trace(model)(x).square().sum().backward()
    found = {key: parameter.grad.clone() for key, parameter in model.named_parameters()}
    model.zero_grad()
    model(x).square().sum().backward()
    for key, parameter in model.named_parameters():
        torch.testing.assert_close(found[key], parameter.grad)


@pytest.mark.parametrize("name", PAIRS)
def test_fx_graphs_keep_the_check_of_the_image_size(name: str) -> None:
    graph = create_feature_extractor(small_model(name), ["head"])
    with pytest.raises((ValueError, AssertionError), match=r"image width 20 is not|Input width .* doesn't match"):
        graph(random_images((IMAGE[0], 20)))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("name", [*PAIRS, "convnext_iso_base"])
def test_torchscript_is_refused_and_tracing_is_right(name: str) -> None:
    model, x = small_model(name), random_images()
    with pytest.raises(NotImplementedError, match="deprecated: use torch.compile or torch.export"):
        torch.jit.script(model)
    traced = torch.jit.trace(model, x, check_trace=False)
    torch.testing.assert_close(traced(3 * x), model(3 * x))


def first_conv(model: nn.Module) -> nn.Module:
    return model.get_submodule(model.pretrained_cfg["first_conv"])


def adapted(name: str, in_chans: int, how: str, path: str) -> nn.Module:
    args = SMALL[MODELS[name].family] | {"img_size": IMAGE, "patch_size": 8, "num_classes": 5, "in_chans": in_chans}
    cfg = {"file": path, "num_classes": 5}
    if how == "pretrained_cfg":
        return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=cfg, **args).eval()
    if how == "checkpoint_path":
        return timm.create_model(name, checkpoint_path=path, **args).eval()
    model = timm.create_model(name, **args).eval()
    timm.models.load_pretrained(model, model.pretrained_cfg | cfg, num_classes=5, in_chans=in_chans)
    return model


@pytest.mark.parametrize("how", ["pretrained_cfg", "checkpoint_path", "load_pretrained"])
@pytest.mark.parametrize("in_chans", [1, 4, 6])
@pytest.mark.parametrize("name", [*PAIRS, *BASELINES])
def test_a_checkpoint_of_three_channels_is_adapted(name: str, in_chans: int, how: str, tmp_path) -> None:
    if name in BASELINES and how == "checkpoint_path":
        pytest.skip("timm does not adapt X here")
    source, path = small_model(name).float(), str(tmp_path / "weights.pth")
    torch.save(source.state_dict(), path)
    model = adapted(name, in_chans, how, path)
    given, found = (conv.kernel() if isinstance(conv, FlopPatchConv) else conv.weight
                    for conv in (first_conv(source), first_conv(model)))  # fmt: skip
    torch.testing.assert_close(found, adapt_input_conv(in_chans, given))
    x = random_images().float()
    if in_chans == 1:  # a grey image is one with three equal channels
        torch.testing.assert_close(model(x[:, :1]), source(x[:, :1].expand(-1, 3, -1, -1)), atol=1e-4, rtol=1e-4)
    if in_chans == 6:
        torch.testing.assert_close(model(torch.cat((x, x), 1)), source(x), atol=1e-4, rtol=1e-4)
    if name in EQUIVARIANT:
        assert_equivariant(model.double(), random_images(channels=in_chans))


def test_loading_a_state_dict_of_other_channels_warns_and_leaves_it_alone(caplog) -> None:
    source, model = small_model("flop_convnext_iso_base"), small_model("flop_convnext_iso_base", in_chans=1)
    state_dict = source.state_dict()
    model.load_state_dict(state_dict)
    assert "stem.even from 3 to 1 input channels" in caplog.text
    assert state_dict["stem.even"].shape[1] == 3
    torch.testing.assert_close(model.stem.even, source.stem.even.sum(1, keepdim=True), atol=1e-6, rtol=1e-6)


def test_a_checkpoint_of_another_patch_size_is_resampled(tmp_path) -> None:
    name, path = "flop_deit3_base_patch16_224", str(tmp_path / "weights.pth")
    source = small_model(name, (32, 32)).float()
    torch.save(source.state_dict(), path)
    args = SMALL["vit"] | {"img_size": (16, 16), "patch_size": 4, "num_classes": 5}
    model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay={"file": path, "num_classes": 5}, **args)
    source.set_input_size((16, 16), patch_size=4)
    x = random_images((16, 16))
    torch.testing.assert_close(model.eval()(x.float()), source(x.float()))
    assert_equivariant(model.double(), x)
