"""Converted checkpoints of octic-vits reproduce its features and logits, which the fixture has from its own code."""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import safe_open
from torch import Tensor, nn

from flopeq.hub.convert import convert_authors_state_dict, convert_checkpoint, infer_args
from flopeq.hub.export import export_model
from flopeq.measure.flops import complexity
from flopeq.models.build import ModelError, build
from flopeq.models.octic_vits import ConcatenatedIrreps
from flopeq.testing import block_errors, equivariance_error
from tests.hub.authors.make_fixture import drawn, images
from tests.hub.authors.make_octic_fixture import FIXTURE, TOKENS

NETWORKS: dict[str, dict[str, Any]] = json.loads(FIXTURE.read_text())["networks"]

every_network = pytest.mark.parametrize("case", NETWORKS)


def authors_weights(network: dict[str, Any]) -> dict[str, Tensor]:
    """The weights that the authors' code had when it computed the fixture."""
    return {
        name: torch.zeros(shape).double() if name in network["frozen"] else drawn(name, shape)
        for name, shape in network["shapes"].items()
    }


def our_args(network: dict[str, Any]) -> dict[str, Any]:
    """The arguments for the size, without those that conversion infers."""
    inferred = ("img_size", "num_classes", "invariant", "octic_equi_break_layer")
    return {name: value for name, value in network["authors_args"].items() if name not in inferred}


def ours(network: dict[str, Any]) -> nn.Module:
    tensors = convert_authors_state_dict(authors_weights(network), network["model"])
    model = timm.create_model(network["model"], **our_args(network), **infer_args(tensors, network["model"]))
    model.double().eval().load_state_dict(tensors, strict=True)
    return model


def inputs(network: dict[str, Any]) -> Tensor:
    return images(network["authors_args"]["img_size"])


def expected(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


@torch.no_grad()
def error_of(model: nn.Module, network: dict[str, Any], dtype: torch.dtype = torch.float64) -> float:
    """Largest difference from the authors' logits, relative to the largest logit."""
    logits = expected(network["logits"])
    return ((model.to(dtype)(inputs(network).to(dtype)).double() - logits).abs().max() / logits.abs().max()).item()


@every_network
def test_converted_weights_give_the_authors_logits(case: str) -> None:
    network = NETWORKS[case]
    model = ours(network)
    assert error_of(model, network) <= 1e-10
    assert error_of(model, network, torch.float32) <= 1e-4


@every_network
@torch.no_grad()
def test_converted_weights_give_the_authors_features(case: str) -> None:
    network = NETWORKS[case]
    model = ours(network)
    features: list[Tensor] = []
    for block in model.get_submodule("blocks").children():
        block.register_forward_hook(lambda module, args, result: features.append(result[0, list(TOKENS)]))
    model(inputs(network))
    in_their_order = ConcatenatedIrreps(features[0].shape[-1]).double()
    for group, found, values in zip(model.block_groups, features, network["features"], strict=True):
        found = in_their_order(found) if group.order > 1 else found
        torch.testing.assert_close(found, expected(values), rtol=0, atol=1e-10)


@every_network
def test_the_logits_depend_on_every_tensor(case: str) -> None:
    model = ours(NETWORKS[case])
    logits = model(inputs(NETWORKS[case]))
    (logits * drawn("loss", logits.shape)).sum().backward()
    unread = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 1e-8]
    assert unread == []


@pytest.mark.parametrize("args", [{"octic_vits": None}, {"octic_vits": "invariant"}])
def test_the_weights_do_not_load_into_a_network_that_computes_something_else(args: dict[str, Any]) -> None:
    network = NETWORKS["H8"]
    tensors = convert_authors_state_dict(authors_weights(network), network["model"])
    model = timm.create_model(network["model"], **our_args(network), img_size=32, num_classes=5, **args)
    with pytest.raises(RuntimeError, match=r"Unexpected key.* \"blocks.1.split.signs\""):
        model.load_state_dict(tensors, strict=True)


def test_octic_blocks_keep_the_law_and_the_invariant_network_is_invariant() -> None:
    hybrid, invariant = ours(NETWORKS["H8"]), ours(NETWORKS["I8"])
    x = inputs(NETWORKS["H8"])
    assert equivariance_error(invariant, x, "d4") <= 1e-10
    assert equivariance_error(hybrid, x, "d4") > 1e-3
    for model in (hybrid, invariant):
        assert block_errors(model, x, "d4")["blocks.0"] <= 1e-10


@every_network
def test_a_published_file_becomes_safetensors_that_timm_loads(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = NETWORKS[case]
    name, source, target = network["model"], tmp_path / "in.pth", tmp_path / "out.safetensors"
    monkeypatch.setattr("flopeq.hub.convert.build", partial(build, **our_args(network)))
    wrapped = {f"_orig_mod.{key}": tensor for key, tensor in authors_weights(network).items()}
    args = argparse.Namespace(model="d8_inv_early_deit_large_patch16", drop_path=0.4)
    torch.save({"model": wrapped, "epoch": 399, "args": args}, source)

    convert_checkpoint(source, name, target)

    with safe_open(target, "pt") as file:
        model_args = json.loads(file.metadata()["model_args"])
    assert model_args["octic_vits"] == ("invariant" if "I8" in case else "hybrid")
    model = timm.create_model(name, checkpoint_path=str(target), **our_args(network), **model_args)
    assert error_of(model.eval(), network, torch.float32) <= 1e-4

    export_model(name, tmp_path / "exported", checkpoint=target, **our_args(network))
    exported = timm.create_model(f"local-dir:{tmp_path / 'exported'}", pretrained=True)
    assert error_of(exported.eval(), network, torch.float32) <= 1e-4
    card = (tmp_path / "exported" / "README.md").read_text()
    assert f"octic_vits={model_args['octic_vits']!r}" in card
    assert ("features that no symmetry changes" in card) == ("I8" in case)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"blocks.0.norm2.scaling.beta": None}, "lacks 'blocks.0.norm2.scaling.beta'"),
        ({"norm.weight": None}, "lacks 'norm.weight'"),
        ({"head_dist.bias": torch.ones(1)}, "1 tensors .* no place in the model: head_dist.bias"),
        ({"cls_token.4": torch.ones(1, 1, 2, 8)}, "'cls_token.4' is frozen at zero"),
        (
            {"invariant_proj.weight": torch.ones(32, 128)},
            "128 invariants to 32 channels, but the power spectrum has 24",
        ),
        ({"mask_token.0": torch.ones(1, 4)}, "DINOv2 backbone"),
    ],
)
def test_a_changed_checkpoint_is_refused(change: dict[str, Tensor | None], message: str) -> None:
    network = NETWORKS["I8"]
    changed = authors_weights(network) | change
    weights = {name: tensor for name, tensor in changed.items() if tensor is not None}
    with pytest.raises(ValueError, match=message):
        convert_authors_state_dict(weights, network["model"])


def test_a_name_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"holds H-D4\(vit\), but .* use a name such as octichybrid_deit3_small"):
        convert_authors_state_dict(authors_weights(NETWORKS["H8"]), "flophybrid_deit3_large_patch16_224")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"octic_vits": "mixed"}, "'mixed' is unknown: use one of 'hybrid', 'invariant'"),
        ({"octic_vits": "hybrid", "symmetry": "d4"}, "blocks of d4 and then ordinary ones"),
        ({"octic_vits": "hybrid", "symmetry": "d4:4,c2"}, "blocks of d4 and then ordinary ones"),
    ],
)
def test_the_argument_is_checked(args: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        build("octichybrid_deit3_large_patch16_224", device="meta", **args)


# Parameters in millions and GFLOPs, as octic-vits' README prints them.
PRINTED = {
    ("large_patch16", "hybrid"): (171, 38),
    ("large_patch16", "invariant"): (175, 39),
    ("huge_patch14", "hybrid"): (356, 102),
    ("huge_patch14", "invariant"): (362, 104),
}


@pytest.mark.parametrize(
    ("size", "kind"), [pytest.param(*case, marks=pytest.mark.slow if "huge" in case[0] else ()) for case in PRINTED]
)
def test_sizes_match_what_octic_vits_prints(size: str, kind: str) -> None:
    """The printed numbers of I8 are those of a network that projects 4C invariants, as many as their polynomial ones.

    Their published code has the power spectrum, with 6C/8 invariants. Their own counts of it are 172 and 357 M.
    """
    model = build(f"octichybrid_deit3_{size}_224", device="meta", octic_vits=kind)
    counted = complexity(model, (3, 224, 224))
    params, flops = counted.params, counted.flops
    if kind == "invariant":
        assert round(params / 1e6) == {"large_patch16": 172, "huge_patch14": 357}[size]
        num_channels, num_tokens = model.embed_dim, model.patch_embed.num_patches + 1
        missing = (4 * num_channels - 6 * num_channels // 8) * num_channels
        params, flops = params + missing, flops + missing * num_tokens
    assert (round(params / 1e6), round(flops / 1e9)) == PRINTED[size, kind]
