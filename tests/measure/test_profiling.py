"""Profiles assign the expected kind to every operation of small networks."""

from __future__ import annotations

import json

import pytest
import torch

from flopeq.cli.app import main
from flopeq.hardware import can_compile
from flopeq.measure.profiling import KINDS, profile
from flopeq.models.build import build

E = "flop_deit3_small_patch16_224"

ARGS = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2}

WORDS = [f"{key}={value}" for key, value in ARGS.items()]


def profile_small(name, compiled=False, trace=None, **args):
    return profile(build(name, **args), name, image_size=(3, 32, 32), batch_size=2, dtype=torch.float32,
                   device="cpu", compiled=compiled, runs=2, trace=trace)  # fmt: skip


def calls(result, kind):
    return {kernel.name: kernel.calls for kernel in result.kernels if kernel.kind == kind}


def test_operations_of_e_vit_by_kind(tmp_path):
    result = profile_small(E, trace=tmp_path / "traces" / "e.json", **ARGS)
    assert calls(result, "linear")["linear"] == 9  # four layers of two blocks, and the head
    assert calls(result, "attention")["scaled_dot_product_attention"] == 1
    assert calls(result, "norm")["sqrt"] == 3
    assert calls(result, "activation") == {"gelu": 2}
    assert calls(result, "convolution")["conv2d"] == 1
    assert calls(result, "change of basis") == {"add": 2, "sub": 2, "mul": 4}
    assert set(result.kinds) == set(KINDS.values())
    assert result.sum_ms == pytest.approx(sum(result.kinds.values()))
    assert result.pass_ms > 0
    assert json.loads((tmp_path / "traces" / "e.json").read_text())["traceEvents"]


def test_unfused_attention_is_attention(monkeypatch):
    model = build("deit3_small_patch16_224", **ARGS)
    monkeypatch.setattr(model.blocks[0].attn, "fused_attn", False)
    result = profile(model, "x", image_size=(3, 32, 32), batch_size=2, dtype=torch.float32, device="cpu",
                     compiled=False, runs=1)  # fmt: skip
    assert {"softmax", "matmul"} <= set(calls(result, "attention"))
    assert calls(result, "linear") == {"linear": 5}
    assert "change of basis" not in result.kinds


@pytest.mark.parametrize("name, args", [
    ("flop_resmlp_base_24_224", {"num_blocks": 1}), ("flop_convnext_iso_small", {"depth": 1}),
])  # fmt: skip
def test_profiles_of_the_other_families_have_changes_of_basis(name, args):
    result = profile_small(name, img_size=32, patch_size=8, embed_dim=32, **args)
    assert {"linear", "norm", "activation", "convolution", "change of basis"} <= set(result.kinds)


@pytest.mark.parametrize("name, args", [
    ("octic_deit3_small_patch16_224", {"depth": 1, "num_heads": 2}), ("octic_resmlp_base_24_224", {"num_blocks": 1}),
    ("mirrors_convnext_iso_small", {"depth": 1}),
])  # fmt: skip
def test_profiles_of_larger_groups_have_the_kinds_of_their_family(name, args):
    result = profile_small(name, img_size=32, patch_size=8, embed_dim=32, **args)
    assert {"linear", "norm", "activation", "convolution", "change of basis"} <= set(result.kinds)
    assert ("attention" in result.kinds) == ("deit3" in name)
    assert not {"matmul", "linear", "conv2d", "gelu", "sigmoid"} & set(calls(result, "other"))
    assert {"add", "sub"} <= set(calls(result, "change of basis"))


@pytest.mark.slow
@pytest.mark.skipif(not can_compile("cpu"), reason="needs a C++ compiler")
def test_fused_kernels_list_their_kinds(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["profile", E, *WORDS, "--device", "cpu", "--batch-size", "2", "--runs", "2", "--json"])
    assert stop.value.code == 0
    eager, compiled = json.loads(capsys.readouterr().out)
    assert (eager["mode"], compiled["mode"]) == ("eager", "compiled")
    assert not any(kind.startswith("fused") for kind in eager["kinds"])
    fused = " ".join(kind for kind in compiled["kinds"] if kind.startswith("fused: "))
    assert "change of basis" in fused and "activation" in fused and "norm" in fused
    assert {"linear", "attention", "convolution"} <= set(compiled["kinds"])
    assert compiled["pass_ms"] > 0 and compiled["trace"] is None


def test_the_command_prints_a_profile_as_a_table(capsys):
    with pytest.raises(SystemExit):
        main(["profile", E, *WORDS, "--device", "cpu", "--batch-size", "2", "--runs", "1", "--no-compile"])
    out = capsys.readouterr().out
    assert all(word in out for word in ("eager (ms)", "change of basis", "a pass, without the profiler"))
