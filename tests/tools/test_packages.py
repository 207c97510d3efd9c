"""PEFT, accelerate, transformers and torchao on our models."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from torch import nn

from flopeq.hub.export import export_model
from flopeq.registry import MODELS
from flopeq.testing import assert_equivariant, block_errors, relative_error
from tests.models.conftest import SMALL, random_images, small_model
from tests.tools.conftest import NAMES, linear_layers

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")


def assert_law(name: str, model: nn.Module, tol: float = 1e-10) -> None:
    """E commutes with the flop as a whole, H up to its split."""
    if name.startswith("flop_"):
        assert_equivariant(model, random_images().to(next(model.parameters()).dtype), tol)
    else:
        errors = block_errors(model, random_images().to(next(model.parameters()).dtype))
        assert all(errors[f"blocks.{index}"] < tol for index in range(model.num_flop_blocks))


def adapt(model: nn.Module, **config) -> nn.Module:
    """The model with LoRA of rank 2 and random values."""
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(model, peft.LoraConfig(r=2, init_lora_weights=False, **config)).double()


@pytest.mark.parametrize("parities", [["even"], ["odd"], ["even", "odd"]])
def test_lora_keeps_the_law_trains_and_merges(name: str, model: nn.Module, parities: list[str]) -> None:
    x = random_images()
    before = model(x)
    adapted = adapt(model, target_modules=parities).eval()
    logits = adapted(x)
    assert relative_error(logits, before) > 1e-3
    assert_law(name, adapted.base_model.model)
    adapted.train()(x).square().sum().backward()
    trained = [(key, parameter.grad) for key, parameter in adapted.named_parameters() if parameter.requires_grad]
    idle = [key for key, grad in trained if grad is None or not grad.abs().max() > 0]
    assert all("blocks.2.mlp.fc2.odd" in key and name == "flop_convnext_iso_base" for key in idle)
    merged = adapted.eval().merge_and_unload()
    torch.testing.assert_close(merged(x), logits)
    assert_law(name, merged)


def test_a_bias_of_an_adapter_on_odd_features_is_refused(name: str, model: nn.Module) -> None:
    adapted = adapt(model, target_modules=["odd"], lora_bias=True).eval()
    if MODELS[name].family == "resmlp":  # its layers have a bias for odd features on odd columns, which is invariant
        assert_law(name, adapted.base_model.model)
    else:
        with pytest.raises(ValueError, match="odd features has a bias, 'lora_B.default.bias'.*lora_bias=False"):
            adapted(random_images())


def test_peft_names_a_layer_that_it_cannot_adapt() -> None:
    with pytest.raises(ValueError, match="FlopLinear"):
        adapt(small_model("flop_deit3_small_patch16_224"), target_modules=["qkv"])


@torch.no_grad()
def test_cpu_offload_computes_the_same(model: nn.Module) -> None:
    accelerate = pytest.importorskip("accelerate")
    x = random_images()
    expected = model(x)
    offloaded = accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert all(parameter.is_meta for parameter in offloaded.parameters())
    torch.testing.assert_close(offloaded(x), expected)


@torch.no_grad()
def test_weight_only_int8_keeps_the_law(name: str, model: nn.Module) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    x = random_images().float()
    expected = model.float()(x)
    layers = linear_layers(model)
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    assert all(type(layer.weight) is not nn.Parameter for layer in layers.values())
    assert 0 < relative_error(model(x), expected) < 0.1
    assert_law(name, model, tol=1e-4)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_transformers_loads_an_exported_folder(name: str, tmp_path) -> None:
    transformers = pytest.importorskip("transformers")
    args = SMALL[MODELS[name].family] | {"img_size": 32, "patch_size": 8, "num_classes": 5}
    export_model(name, tmp_path / "folder", **args)
    expected = timm.create_model(f"local-dir:{tmp_path}/folder", pretrained=True).eval()
    wrapped = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "folder").eval()
    x = random_images((32, 32)).float()
    torch.testing.assert_close(wrapped(x).logits, expected(x))
    copied = copy.deepcopy(wrapped)
    assert copied(x, labels=torch.tensor([0, 1])).loss.isfinite()
