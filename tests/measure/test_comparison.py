"""Measuring Table 1: selection of rows, the CSV file, resuming, and the columns beside the paper's values."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from torch import nn

from flopeq.cli.app import main
from flopeq.measure import comparison
from flopeq.measure.comparison import load_rows, measure_table1, results_path, save_rows, select_rows
from flopeq.measure.throughput import Protocol
from flopeq.models.build import build
from flopeq.registry import MODELS

PROTOCOL = Protocol(batch_size=2, warmup=0, runs=2, dtype=torch.float32, compile=False)

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 32}

DEPTH = {"vit": {"depth": 2, "num_heads": 2}, "convnext_iso": {"depth": 2}, "resmlp": {"num_blocks": 2}}

SIZE = (3, 32, 32)


def build_small(name, device="cpu"):
    """A narrow, shallow model of that name. timm fixes the sizes of two ResMLPs, so ResMLP-B24 replaces them."""
    family = MODELS[name].family
    name = name.replace("resmlp_12_", "resmlp_base_24_").replace("resmlp_24_", "resmlp_base_24_")
    return build(name, device=device, **SMALL, **DEPTH[family])


class OutOfMemoryModel(nn.Module):
    """Raises an out-of-memory error in every forward pass."""

    def forward(self, images):
        raise torch.OutOfMemoryError("more memory than there is")


def measure(rows, path, build=build_small, protocol=PROTOCOL, on_progress=None):
    return measure_table1(rows, protocol, "cpu", path, on_progress, SIZE, build)


def test_patterns_choose_rows_and_the_x_they_are_compared_with():
    assert [row.paper_name for row in select_rows(["e(vit-b)"])] == ["ViT-B", "E(ViT-B)"]
    assert [row.size for row in select_rows(["S"])] == 6 * ["S"]
    assert {row.family for row in select_rows(["resmlp", "*ConvNeXt-S*"])} == {"resmlp", "convnext_iso"}
    assert len(select_rows([])) == 25
    with pytest.raises(ValueError, match=r"'E\(ViT-Z\)'; did you mean 'E\(ViT-"):
        select_rows(["E(ViT-Z)"])


def test_a_row_has_measured_values_ratios_and_the_papers_values(tmp_path):
    path = tmp_path / "table.csv"
    x, h, e = measure(select_rows(["ViT-H", "H(ViT-H)", "E(ViT-H)"]), path)
    assert [row.variant for row in (x, h, e)] == ["X", "H", "E"]
    assert e.flop_ratio == pytest.approx(x.flops / e.flops, rel=1e-5) and e.flop_ratio > h.flop_ratio > 1
    assert e.throughput_ratio_q1 <= e.throughput_ratio <= e.throughput_ratio_q3
    assert e.share == pytest.approx(e.throughput_ratio / e.flop_ratio, rel=1e-4)
    assert (x.flop_ratio, x.throughput_ratio, x.share) == (None, None, None)
    assert e.paper_throughput_ratio == pytest.approx(501 / 431, rel=1e-5)
    assert e.paper_share == pytest.approx(501 / 431 * 87.3 / 168.0, rel=1e-5)
    assert (e.peak_mem_mb, e.first_pass_s, e.device, e.status, e.alternating) == (None, None, "cpu", "ok", True)
    assert load_rows(path) == [x, h, e]


def test_rows_of_training_steps_leave_out_the_papers_forward_pass(tmp_path):
    *_, e = measure(select_rows(["E(ViT-S)"]), tmp_path / "t.csv", protocol=replace(PROTOCOL, train=True))
    assert e.mode == "train" and e.img_per_s > 0
    assert (e.paper_img_per_s, e.paper_peak_mem_mb, e.paper_share) == (None, None, None)


def test_an_interrupted_measurement_resumes_with_the_missing_rows(tmp_path):
    path, rows = tmp_path / "table.csv", select_rows(["B"])
    seen: list[str] = []

    def interrupted(model, done, total):
        if MODELS[model].family == "vit":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure(rows, path, on_progress=interrupted)
    first = load_rows(path)
    assert [row.family for row in first] == ["resmlp", "resmlp"]
    done = measure(rows, path, on_progress=lambda model, *_: seen.append(model))
    assert {MODELS[model].family for model in seen} == {"vit", "convnext_iso"}
    assert done[:2] == first
    assert measure(rows, path, build=None) == done  # nothing is left to build


def test_more_passes_measure_again(tmp_path):
    path, rows = tmp_path / "table.csv", select_rows(["E(ViT-S)"])
    measure(rows, path)
    assert {row.runs for row in measure(rows, path, protocol=replace(PROTOCOL, runs=3))} == {3}
    assert len(load_rows(path)) == 2


def test_out_of_memory_is_a_row(tmp_path):
    def greedy(name, device="cpu"):
        return OutOfMemoryModel() if MODELS[name].variant == "X" and device == "cpu" else build_small(name, device)

    x, e = measure(select_rows(["E(ViT-S)"]), tmp_path / "t.csv", build=greedy)
    assert (x.status, x.img_per_s, e.status) == ("out of memory", None, "ok")
    assert e.img_per_s > 0 and (e.throughput_ratio, e.share, e.alternating) == (None, None, False)
    assert load_rows(tmp_path / "t.csv") == [x, e]


def test_a_file_of_other_columns_is_not_overwritten(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("model,speed\n")
    with pytest.raises(ValueError, match="other columns"):
        measure(select_rows(["E(ViT-S)"]), path)
    save_rows(path, [])
    assert load_rows(path) == [] and list(tmp_path.iterdir()) == [path]


def test_the_file_name_holds_device_dtype_batch_mode_and_versions(tmp_path):
    names = {
        results_path(tmp_path, protocol, "cpu").name
        for protocol in (PROTOCOL, replace(PROTOCOL, train=True), replace(PROTOCOL, batch_size=3),
                         replace(PROTOCOL, dtype=torch.bfloat16))
    }  # fmt: skip
    assert len(names) == 4
    assert all(f"torch{torch.__version__.partition('+')[0]}" in name and "eager" in name for name in names)


def test_the_command_prints_and_saves_table_1(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(comparison.measure_table1, "__defaults__", (None, SIZE, build_small))

    def run(*words):
        options = ("--device", "cpu", "--no-compile", "--batch-size", "2", "--warmup", "0", "--runs", "2")
        with pytest.raises(SystemExit) as stop:
            main(["throughput", "--table1", *words, *options, "--results", str(tmp_path)])
        return stop.value.code, *capsys.readouterr()

    code, out, err = run("--rows", "E(ViT-S)")
    [kept] = tmp_path.iterdir()
    assert code == 0 and err == ""
    assert all(word in out for word in ("E(ViT-S)", "7,174", "6,565", "share", str(kept)))
    code, out, _ = run("--rows", "ViT-S", "--json")
    [x] = json.loads(out)
    assert x["model"] == "deit3_small_patch16_224" and x["peak_mem_mb"] is None and x["paper_img_per_s"] == 7174
    assert run("resnet18")[0] == 2
    code, _, err = run("--rows", "E(Vit-SS)")
    assert code == 2 and "did you mean 'E(ViT-S)'" in err


def test_an_interrupted_command_tells_how_to_resume(tmp_path, capsys, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(comparison, "measure_table1", interrupted)
    with pytest.raises(SystemExit) as stop:
        main(["throughput", "--table1", "--device", "cpu", "--results", str(tmp_path)])
    assert stop.value.code == 130
    assert "run the same command to resume" in capsys.readouterr().err
