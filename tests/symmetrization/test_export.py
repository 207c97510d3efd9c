"""Symmetrized models in timm's registry, and exported folders: timm loads the same network from them."""

from __future__ import annotations

import json

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models import save_for_hf
from torch import nn

import flopeq
from flopeq.cli.app import main
from flopeq.hub.export import export_model
from flopeq.measure.flops import complexity
from flopeq.models.build import build
from tests.symmetrization.networks import KINDS, add_noise, random_images, tiny

VIT, VIT_ARGS = KINDS["vit"]


def loaded(folder, **args) -> nn.Module:
    return timm.create_model(f"local-dir:{folder}", pretrained=True, **args).eval()


@pytest.fixture
def run(tmp_path):
    """The folder of a trained run, as the pipeline writes it."""
    folder = tmp_path / "outputs" / "vit"
    folder.mkdir(parents=True)
    model = add_noise(timm.create_model(VIT, num_classes=5, **VIT_ARGS)).eval()
    save_file(model.state_dict(), folder / "weights.safetensors")
    config = {
        "run": "vit", "model": VIT, "args": VIT_ARGS, "seed": 3,
        "data": {"name": "digits", "image_size": 16, "interpolation": "bilinear", "mean": [0.5, 0.5, 0.5],
                 "std": [0.2, 0.2, 0.2], "further_val": {}},
        "recipe": {"name": "quick", "epochs": 60, "test_crop_ratio": 0.9},
        "train": {"workers": 1, "cpus_per_worker": 2, "amp": "bf16", "compile": True},
    }  # fmt: skip
    (folder / "config.yaml").write_text(json.dumps(config))  # JSON is YAML
    (folder / "metrics.json").write_text(json.dumps({"val/top1_pct": 97.2222, "converged": True}))
    (folder / "run.json").write_text(json.dumps({"run": "vit", "status": "finished", "best_epoch": 47}))
    return folder, model


def call(*words: object) -> int:
    with pytest.raises(SystemExit) as stop:
        main([str(word) for word in words])
    return stop.value.code  # pyright: ignore[reportReturnType]


@pytest.mark.parametrize("how", ["average", "choose", "canonical"])
def test_the_command_exports_a_run_that_timm_loads(run, how, tmp_path, capsys) -> None:
    folder, model = run
    assert call("symmetrize", "--run", folder, tmp_path / "out", "--group", "d4", "--how", how, "--json") == 0
    [written] = json.loads(capsys.readouterr().out)
    images = random_images().float()
    again = loaded(tmp_path / "out")
    assert torch.equal(again(images), flopeq.symmetrize(model, "d4", how)(images))
    assert written["equivariance_error"] < 1e-10
    assert written["flops"] == complexity(again, (3, 16, 16)).flops
    assert timm.data.resolve_model_data_config(again)["std"] == [0.2, 0.2, 0.2]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "`d4`" in card and "Not evaluated." in card and "97.2" not in card
    assert "state_dict" not in again.pretrained_cfg and "state_dict" not in again.model.pretrained_cfg


def test_a_folder_loads_with_other_classes_channels_and_groups(run, tmp_path) -> None:
    folder, model = run
    assert call("symmetrize", "--run", folder, tmp_path / "out") == 0
    assert loaded(tmp_path / "out", num_classes=9)(random_images().float()).shape == (2, 9)
    grey = random_images().float()[:, :1]
    expected = flopeq.symmetrize(model, "flop")(grey.expand(-1, 3, -1, -1))
    torch.testing.assert_close(loaded(tmp_path / "out", in_chans=1)(grey), expected, atol=1e-4, rtol=1e-4)
    d4 = loaded(tmp_path / "out", group="d4")
    torch.testing.assert_close(
        d4(grey.expand(-1, 3, -1, -1)), flopeq.symmetrize(model, "d4")(grey.expand(-1, 3, -1, -1))
    )


@pytest.mark.parametrize("kind", ["resnet", "E(resmlp)", "convnext"])
@pytest.mark.parametrize("how", ["average", "weighted"])
def test_a_model_that_is_saved_by_timm_is_loaded_by_timm(kind: str, how: str, tmp_path) -> None:
    model = flopeq.symmetrize(tiny(kind).float(), "c4", how)
    if how == "weighted":
        add_noise(model.weight_net)
    save_for_hf(model, str(tmp_path), safe_serialization=True)
    again, images = loaded(tmp_path), random_images().float()
    assert torch.equal(again(images), model(images))
    assert again.how == how and again.group == model.group
    again.reset_classifier(3)
    save_for_hf(again, str(tmp_path), safe_serialization=True)
    assert torch.equal(loaded(tmp_path)(images), again(images))


def test_it_is_a_model_of_timms_registry(capsys) -> None:
    f = build("symmetrized", model="resnet10t", group="d4", num_classes=3)
    assert isinstance(f, flopeq.Symmetrized) and len(f.group) == 8 and f.num_classes == 3
    assert f.pretrained_cfg["architecture"] == "symmetrized" and f.pretrained_cfg["classifier"] == "model.fc"
    assert call("complexity", "symmetrized", "model=resnet10t", "--image-size", "32", "--json") == 0
    assert call("complexity", "resnet10t", "--image-size", "32", "--json") == 0
    twice, once = (json.loads(line)[0] for line in capsys.readouterr().out.strip().replace("]\n[", "]\0[").split("\0"))
    assert twice["macs"] == 2 * once["macs"] and twice["params"] == once["params"]


@pytest.mark.parametrize("words, message", [
    (("resnet10t", "{out}", "--group", "c8"), "'c8' is unknown"),
    (("resnet10t", "{out}", "--how", "mean"), "'mean' is unknown"),
    (("resnet10t", "{out}", "--how", "weighted"), "have to be trained"),
    (("resnet10t",), "MODEL OUT_DIR"),
])  # fmt: skip
def test_errors_are_one_line(words, message, tmp_path, capsys) -> None:
    assert call("symmetrize", *(word.format(out=tmp_path / "out") for word in words)) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and message in err and len(err.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_symmetrized_run_names_the_command_that_exports_it(run, tmp_path) -> None:
    trained, _ = run
    folder = trained.parent / "vit-sym"
    folder.mkdir()
    described = json.loads((trained / "config.yaml").read_text())
    described["symmetrize"] = {"weights_of": "vit", "group": "flop", "how": "choose"}
    (folder / "config.yaml").write_text(json.dumps(described))
    with pytest.raises(ValueError, match=f"use `flopeq symmetrize --run {trained} --group 'flop' --how choose`"):
        export_model(None, tmp_path / "out", run=folder)
