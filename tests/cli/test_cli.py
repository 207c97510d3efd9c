"""The command line: JSON, tables and error messages."""

from __future__ import annotations

import argparse
import json

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from flopeq.cli import output
from flopeq.cli.app import main
from flopeq.measure.flops import complexity
from flopeq.models.build import build
from flopeq.registry import MODELS

SMALL = ("img_size=32", "patch_size=8", "embed_dim=64", "depth=2", "num_heads=2")

ARGS = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 2}

X, E = "deit3_small_patch16_224", "flop_deit3_small_patch16_224"


@pytest.fixture
def flopeq(capsys):
    """Runs the command line: arguments -> (exit code, stdout, stderr)."""

    def run(*words: str) -> tuple[object, str, str]:
        with pytest.raises(SystemExit) as stop:
            main(list(words))
        return stop.value.code, *capsys.readouterr()

    return run


@pytest.fixture
def rows(flopeq):
    """Runs a command with --json: arguments -> the decoded output."""

    def run(*words: str) -> list[dict]:
        code, out, _ = flopeq(*words, "--json")
        assert code == 0
        return json.loads(out)

    return run


def test_list_names_all_models(rows):
    listed = rows("list")
    assert [row["model"] for row in listed] == list(MODELS)
    assert listed[1] == {"model": E, "paper_name": "E(ViT-S)", "family": "vit", "variant": "E"}


def test_complexity_counts_models_with_their_arguments(rows):
    x, e = rows("complexity", X, E, *SMALL)
    counted = complexity(build(E, device="meta", **ARGS), (3, 32, 32))
    assert e == {
        "model": E,
        "params": counted.params,
        "flops": counted.flops,
        "macs": counted.macs,
        "elementwise": counted.elementwise,
    }
    assert x["model"] == X and x["macs"] > e["macs"]


def test_complexity_takes_any_timm_model_and_image_size(rows):
    small, large = (rows("complexity", "resnet18", "--image-size", side)[0] for side in ("32", "64"))
    assert small["params"] == large["params"] == 11689512
    assert 3.9 < large["macs"] / small["macs"] < 4.1


def test_complexity_prints_a_table_for_people(flopeq):
    code, out, _ = flopeq("complexity", E)
    assert code == 0
    assert E in out and "11.04" in out and "2.58" in out


def test_throughput_prints_the_protocol(flopeq, rows):
    words = (
        "throughput",
        X,
        E,
        *SMALL,
        "--device",
        "cpu",
        "--no-compile",
        "--batch-size",
        "2",
        "--runs",
        "2",
    )
    for row, model in zip(rows(*words), (X, E), strict=True):
        assert (row["model"], row["device"], row["dtype"], row["batch_size"]) == (model, "cpu", "float32", 2)
        assert (row["peak_mem_mb"], row["compiled"], row["runs"]) == (None, False, 2)
        assert row["img_per_s"] > 0
    _, out, _ = flopeq(*words, "--dtype", "bfloat16")
    assert "cpu, bfloat16, batch 2, eager, median of 2 passes" in out


def test_throughput_needs_one_image_size(flopeq):
    code, _, err = flopeq("throughput", "vit_tiny_patch16_224", "vit_tiny_patch16_384", "--device", "cpu")
    assert code == 2
    assert "--image-size" in err


def test_equivariance_distinguishes_E_from_X(rows):
    x, e = rows("equivariance", X, E, *SMALL)
    assert x["max_rel_error"] > 1e-2
    assert e["max_rel_error"] < 1e-10
    assert list(e["blocks"]) == ["blocks.0", "blocks.1"]
    assert max(e["blocks"].values()) < 1e-10


def test_equivariance_loses_digits_in_lower_precision(rows):
    [e] = rows("equivariance", E, *SMALL, "--dtype", "float32")
    assert 1e-12 < e["max_rel_error"] < 1e-4


def test_equivariance_prints_a_line_per_block(flopeq):
    code, out, _ = flopeq("equivariance", E, *SMALL)
    assert code == 0
    assert all(part in out for part in (E, "logits", "blocks.0", "blocks.1"))


def test_equivariance_tries_every_symmetry_of_the_first_block(rows, flopeq):
    words = ("octic_deit3_small_patch16_224", *SMALL, "symmetry=d4:1,c2:1")
    [graded] = rows("equivariance", *words)
    errors = graded["symmetries"]
    assert len(errors["logits"]) == 7 and list(errors) == ["blocks.0", "blocks.1", "logits"]
    assert max(errors["blocks.0"].values()) < 1e-10
    assert {g for g, error in errors["logits"].items() if error < 1e-10} == {"flop"}
    assert graded["max_rel_error"] == max(errors["logits"].values())
    _, out, _ = flopeq("equivariance", *words, "--group", "c2xc2")
    assert "half turn" in out and "transposition" not in out


def test_convert_writes_a_checkpoint_that_our_model_loads(rows, tmp_path):
    """Converts a ResMLP in the authors' layout, made by renaming the tensors of flopeq's model."""
    source, target = tmp_path / "in.pth", tmp_path / "out.safetensors"
    model = build("resmlp_12_224", num_classes=3)
    theirs = {
        name.replace("stem", "patch_embed").replace("linear_tokens", "attn").replace("mlp_channels", "mlp")
        .replace(".ls", ".gamma_"): tensor.flatten() if tensor.ndim == 3 else tensor
        for name, tensor in model.state_dict().items()
    }  # fmt: skip
    published = {f"_orig_mod.{name}": tensor for name, tensor in theirs.items()}
    torch.save({"model": published, "args": argparse.Namespace(model="resmlp_12")}, source)
    [row] = rows("convert", str(source), "resmlp_12_224", str(target))
    assert row == {"model": "resmlp_12_224", "tensors": len(theirs), "file": str(target),
                   "params": sum(parameter.numel() for parameter in model.parameters())}  # fmt: skip
    written = load_file(target)
    assert all(written[name].equal(tensor) for name, tensor in model.state_dict().items())


def test_convert_of_a_missing_file_is_an_error(flopeq, tmp_path):
    code, _, err = flopeq("convert", str(tmp_path / "none.pth"), X, str(tmp_path / "out.safetensors"))
    assert code == 2
    assert err.startswith("error: ") and "none.pth" in err


@pytest.mark.parametrize("command", ["complexity", "throughput", "equivariance"])
@pytest.mark.parametrize(
    "words, message",
    [
        (("flop_deit3_smal_patch16_224",), "did you mean 'flop_deit3_small_patch16_224'?"),
        ((E, "detph=3"), "did you mean 'depth'?"),
        ((X, "detph=3"), "did you mean 'depth'?"),
        ((E, "depth=three"), "depth"),
        ((E, "embed_dim=63"), "63"),
        (("depth=3",), "name at least one model"),
    ],
)
def test_invalid_input_is_one_line_and_exit_code_2(command, words, message, flopeq):
    code, out, err = flopeq(command, *words)
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and message in err
    assert len(err.splitlines()) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_an_error(flopeq):
    code, _, err = flopeq("throughput", X, "--device", "cuda")
    assert code == 2
    assert "there is no GPU" in err


def test_argument_values_are_literals_or_strings(rows):
    words = ("complexity", E, *SMALL, "global_pool=avg", "qkv_bias=false", "num_classes=3")
    [counted] = rows(*words)
    model = build(E, device="meta", **ARGS, global_pool="avg", qkv_bias=False, num_classes=3)
    assert counted["params"] == sum(parameter.numel() for parameter in model.parameters())


COMMANDS = ("list", "complexity", "throughput", "profile", "equivariance", "export", "symmetrize", "convert")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_examples_and_json(command, flopeq):
    code, out, _ = flopeq(command, "--help")
    assert code == 0
    assert f"flopeq {command}" in out and "--json" in out and "Examples:" in out


def test_help_lists_the_exit_codes(flopeq):
    code, out, _ = flopeq("--help")
    assert code == 0
    assert "Exit codes: 0 success; 2" in out and "--install-completion" in out


@pytest.mark.parametrize(
    "words, message",
    [
        (("througput", X), "throughput"),
        (("throughput", X, "--bach-size", "2"), "--batch-size"),
        (("throughput", X, "--dtype", "float23"), "did you mean 'float32'"),
        (("equivariance", X, "--dtype", "flaot64"), "did you mean 'float64'"),
        (("throughput", X, "--device", "cudo"), "did you mean 'cuda'"),
        (("throughput", X, "--rows", "S"), "--table1"),
        (("throughput", X, "--table1"), "--rows"),
    ],
)
def test_an_error_names_the_nearest_choice(words, message, flopeq):
    code, out, err = flopeq(*words)
    assert (code, out) == (2, "")
    assert message in err


def test_several_models_are_compared_with_the_first(rows):
    x, e = rows(
        *("throughput", X, E, *SMALL, "--train", "--device", "cpu", "--no-compile", "--batch-size", "2", "--runs", "2")
    )
    assert (x["mode"], x["flop_ratio"], x["throughput_ratio"], x["share"]) == ("train", 1, 1, 1)
    assert e["share"] == pytest.approx(e["throughput_ratio"] / e["flop_ratio"])
    assert e["first_pass_s"] is None


def test_a_model_that_does_not_fit_into_memory_is_an_error(flopeq, monkeypatch):
    def greedy(*args, **kwargs):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(torch.nn.Module, "__call__", greedy)
    code, _, err = flopeq("throughput", X, *SMALL, "--device", "cpu", "--no-compile", "--batch-size", "2")
    assert code == 2
    assert err == f"error: {X} does not fit into memory: use a smaller batch\n"


def test_progress_shows_on_a_terminal_only(monkeypatch, capsys):
    def output_of(terminal: bool) -> str:
        monkeypatch.setattr(Console, "is_terminal", property(lambda console: terminal))
        with output.progress_bar() as on_progress:
            on_progress("a model", 1, 2)
        return capsys.readouterr().err

    assert "a model" in output_of(True)
    assert output_of(False) == ""
