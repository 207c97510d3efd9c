"""Converted checkpoints reproduce the authors' logits. The logits in the fixture come from the authors' code."""

from __future__ import annotations

import argparse
import json
import os
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, safe_open
from torch import Tensor, nn

from flopeq.hub.convert import convert_authors_state_dict, convert_checkpoint, load_authors_checkpoint
from flopeq.models.build import build
from tests.hub.authors.make_fixture import FIXTURE, drawn, images

NETWORKS: dict[str, dict[str, Any]] = json.loads(FIXTURE.read_text())["networks"]

TOKENS = "patch_embed.flatten_and_permute"

every_network = pytest.mark.parametrize("case", NETWORKS)


def authors_weights(network: dict[str, Any]) -> dict[str, Tensor]:
    """The weights that the authors' code had when it computed the fixture's logits."""
    weights = {}
    for name, shape in network["shapes"].items():
        frozen = network["frozen"].get(name)
        if frozen is None:
            weights[name] = drawn(name, shape)
        else:
            weights[name] = torch.tensor(frozen) if isinstance(frozen, list) else torch.zeros(shape).double()
    return weights


def our_args(network: dict[str, Any]) -> dict[str, Any]:
    """The arguments of flopeq's model that correspond to those of the authors' class."""
    renamed = {
        "dim": "embed_dim",
        "layer_scale_init_value": "ls_init_value",
        "depth": "num_blocks" if "resmlp" in network["model"] else "depth",
    }
    args = {renamed.get(name, name): value for name, value in network["authors_args"].items()}
    if args.pop("use_symmetrized_asym_feats", False):
        args["head"] = "even+abs_odd"
    if "convnext" in network["model"]:
        args.setdefault("ls_init_value", None)
    return {name: value for name, value in args.items() if name not in ("use_fused_attn", "use_attn_mixer")}


def ours(network: dict[str, Any]) -> nn.Module:
    model = timm.create_model(network["model"], **our_args(network)).double().eval()
    model.load_state_dict(convert_authors_state_dict(authors_weights(network), network["model"]), strict=True)
    return model


@torch.no_grad()
def error_of(model: nn.Module, network: dict[str, Any], dtype: torch.dtype = torch.float64) -> float:
    """Largest difference from the authors' logits, relative to the largest logit."""
    expected = torch.tensor(network["logits"], dtype=torch.float64)
    logits = model.to(dtype)(images(network["authors_args"]["img_size"]).to(dtype)).double()
    return ((logits - expected).abs().max() / expected.abs().max()).item()


@every_network
def test_converted_weights_give_the_authors_logits(case: str) -> None:
    network = NETWORKS[case]
    model = ours(network)
    assert error_of(model, network) <= 1e-10
    assert error_of(model, network, torch.float32) <= 1e-4


@every_network
def test_the_logits_depend_on_every_tensor(case: str) -> None:
    network = NETWORKS[case]
    model = ours(network)
    # Under the even head nothing reads what the last block of E(ConvNeXt) adds to the odd channels.
    unread = {"blocks.1.mlp.fc2.odd.weight"} if case in ("E(ConvNeXt)", "E(ConvNeXt), scaled") else set()
    logits = model(images(network["authors_args"]["img_size"]))
    (logits * drawn("loss", logits.shape)).sum().backward()
    for name, parameter in model.named_parameters():
        moves = parameter.grad is not None and parameter.grad.abs().max() > 1e-6
        assert moves == (name not in unread), name


def test_shifts_that_the_authors_never_apply_become_zero() -> None:
    tensors = ours(NETWORKS["E(ResMLP)"]).state_dict()
    shifts = [tensor for name, tensor in tensors.items() if name.startswith("blocks.") and "beta" in name]
    assert len(shifts) == 4
    assert not any(shift.any() for shift in shifts)


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod."])
def test_prefixes_of_wrappers_are_stripped(prefix: str) -> None:
    network = NETWORKS["H(ViT)"]
    weights = authors_weights(network)
    wrapped = {prefix + name: tensor for name, tensor in weights.items()}
    plain = convert_authors_state_dict(weights, network["model"])
    assert convert_authors_state_dict(wrapped, network["model"]).keys() == plain.keys()


def test_pointwise_weights_may_come_from_linear_layers() -> None:
    network = NETWORKS["X(ConvNeXt), scaled"]
    weights = authors_weights(network)
    older = {name: tensor.flatten(1) if "pwconv" in name and tensor.ndim == 4 else tensor
             for name, tensor in weights.items()}  # fmt: skip
    plain = convert_authors_state_dict(weights, network["model"])
    for name, tensor in convert_authors_state_dict(older, network["model"]).items():
        assert torch.equal(tensor, plain[name]), name


@pytest.mark.parametrize(
    ("case", "change", "message"),
    [
        ("E(ViT)", {"blocks.1.norm2.scaling.beta": None}, "lacks 'blocks.1.norm2.scaling.beta'"),
        ("E(ViT)", {"head_dist.bias": torch.ones(1)}, "1 tensors .* no place in the model: head_dist.bias"),
        ("E(ViT)", {"cls_token.1": torch.ones(1)}, "'cls_token.1' is frozen at zero"),
        ("E(ViT)", {f"{TOKENS}.permutation": torch.arange(18)}, "order of tokens"),
        ("E(ResMLP)", {f"{TOKENS}_to_fourier.right_idx": torch.arange(18)}, "order of tokens"),
        ("E(ConvNeXt)", {"blocks.0.dwconv.sym_to_asym.zero_center": torch.ones(1)}, "is frozen at zero"),
    ],
)
def test_a_changed_checkpoint_is_refused(case: str, change: dict[str, Tensor | None], message: str) -> None:
    network = NETWORKS[case]
    changed = authors_weights(network) | change
    weights = {name: tensor for name, tensor in changed.items() if tensor is not None}
    with pytest.raises(ValueError, match=message):
        convert_authors_state_dict(weights, network["model"])


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("deit3_small_patch16_224", r"holds E\(vit\), but deit3_small_patch16_224 is X\(vit\)"),
        ("flop_resmlp_24_224", "use a name such as flop_deit3_small_patch16_224"),
        ("flop_deit3_smal_patch16_224", "did you mean 'flop_deit3_small_patch16_224'"),
        ("resnet18", "'resnet18' is not a model of the study"),
    ],
)
def test_a_name_that_does_not_fit_is_refused(model: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        convert_authors_state_dict(authors_weights(NETWORKS["E(ViT)"]), model)


def test_other_networks_are_refused() -> None:
    with pytest.raises(ValueError, match="not a checkpoint of the authors' .* holds conv1.weight"):
        convert_authors_state_dict({"conv1.weight": torch.ones(1)}, "flop_deit3_small_patch16_224")
    with pytest.raises(ValueError, match="it holds nothing"):
        convert_authors_state_dict({}, "flop_deit3_small_patch16_224")


@every_network
def test_a_published_file_becomes_safetensors_that_timm_loads(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = NETWORKS[case]
    name, source, target = network["model"], tmp_path / "in.pth", tmp_path / "out.safetensors"
    seen = ("num_classes", "head", "img_size", "ls_init_value")
    narrow = {key: value for key, value in our_args(network).items() if key not in seen}
    monkeypatch.setattr("flopeq.hub.convert.build", partial(build, **narrow))
    wrapped = {f"_orig_mod.{key}": tensor for key, tensor in authors_weights(network).items()}
    args = argparse.Namespace(model="hybrid_deit_small_patch16_LS", drop_path=0.1)
    torch.save({"model": wrapped, "epoch": 399, "args": args}, source)

    written = convert_checkpoint(source, name, target)

    stored = load_file(target)
    assert stored.keys() == written.keys()
    assert all(torch.equal(stored[key], tensor) for key, tensor in written.items())
    with safe_open(target, "pt") as file:
        metadata = file.metadata()
    assert metadata["model"] == name
    model = timm.create_model(name, checkpoint_path=str(target), **narrow, **json.loads(metadata["model_args"]))
    assert error_of(model.eval(), network, torch.float32) <= 1e-4


def test_a_network_of_another_size_is_refused(tmp_path: Path) -> None:
    network = NETWORKS["E(ViT)"]
    torch.save({"model_ema": authors_weights(network)}, tmp_path / "in.pth")
    with pytest.raises(ValueError, match="another size than flop_deit3_small_patch16_224"):
        convert_checkpoint(tmp_path / "in.pth", network["model"], tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


class Malicious:
    """Runs a command if it is unpickled without restrictions."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.proof),)


@pytest.mark.parametrize("where", ["model", "args"])
def test_a_file_with_other_objects_is_refused_unexecuted(where: str, tmp_path: Path) -> None:
    evil, proof = tmp_path / "evil.pth", tmp_path / "proof"
    object_ = Malicious(proof)
    torch.save({"model": {}} | {where: object_ if where == "model" else argparse.Namespace(x=object_)}, evil)
    with pytest.raises(ValueError, match="evil.pth holds a .*mkdir, but only tensors"):
        load_authors_checkpoint(evil)
    assert not proof.exists()


def test_files_that_are_not_checkpoints_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "in.pth"
    with pytest.raises(OSError, match="in.pth"):
        load_authors_checkpoint(path)
    for content in (b"", b"hello world", b"PK\x03\x04abc"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="not a file that torch.save wrote"):
            load_authors_checkpoint(path)
    torch.save([torch.ones(1)], path)
    with pytest.raises(ValueError, match="holds a list"):
        load_authors_checkpoint(path)
    torch.save({"model": {"epoch": 3}}, path)
    with pytest.raises(ValueError, match="no state dict"):
        load_authors_checkpoint(path)


def test_early_invariant_networks_are_recognized_by_their_arguments(tmp_path: Path) -> None:
    network = NETWORKS["H(ViT)"]
    args = argparse.Namespace(model="d2_inv_early_deit_medium_patch16_LS")
    torch.save({"model": authors_weights(network), "args": args}, tmp_path / "in.pth")
    with pytest.raises(ValueError, match="d2_inv_early_deit_medium_patch16_LS, which flopeq does not have"):
        load_authors_checkpoint(tmp_path / "in.pth")
