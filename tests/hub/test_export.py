"""Exported folders: timm loads the same network from them, and the card shows the measured values."""

from __future__ import annotations

import json

import pytest
import timm
import torch
import yaml
from safetensors.torch import save_file

from flopeq.cli.app import main
from flopeq.hub.export import export_model, measure_equivariance_errors
from flopeq.hub.model_card import render_card
from flopeq.models.build import build
from flopeq.registry import MODELS
from tests.models.conftest import SMALL, randomize_parameters

ARGS = {"img_size": 32, "patch_size": 8, "num_classes": 5}

X, E, H = "deit3_small_patch16_224", "flop_deit3_small_patch16_224", "flophybrid_deit3_small_patch16_224"

NETWORKS = {
    X: "vit", E: "vit", H: "vit",
    "resmlp_base_24_224": "resmlp", "flop_resmlp_24_224": "resmlp", "flophybrid_resmlp_24_224": "resmlp",
    "convnext_iso_small": "convnext_iso", "flop_convnext_iso_small": "convnext_iso",
    "flophybrid_convnext_iso_small": "convnext_iso",
}  # fmt: skip


def weights_of(name, path, **args):
    """Builds a small model with random weights and saves them to `path`."""
    model = randomize_parameters(build(name, **args)).eval()
    save_file(model.state_dict(), path)
    return model


def loaded(folder):
    return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()


@pytest.mark.parametrize("name", NETWORKS)
def test_timm_loads_a_bit_identical_network(name, tmp_path):
    args = SMALL[NETWORKS[name]] | ARGS
    model = weights_of(name, tmp_path / "w.safetensors", **args)
    written = export_model(name, tmp_path / "out", checkpoint=tmp_path / "w.safetensors", **args)
    images = torch.randn(2, 3, 32, 32)
    again = loaded(tmp_path / "out")
    assert type(again) is type(model)
    assert torch.equal(again(images), model(images))
    assert again.pretrained_cfg["input_size"] == (3, 32, 32)
    assert (written.equivariance_error < 1e-12) == name.startswith("flop_")
    assert written.params == sum(parameter.numel() for parameter in model.parameters())


def test_model_arguments_survive_the_export(tmp_path):
    args = SMALL["vit"] | ARGS | {"num_flop_blocks": 1, "global_pool": "avg"}
    model = weights_of(H, tmp_path / "w.safetensors", **args)
    export_model(H, tmp_path / "out", checkpoint=tmp_path / "w.safetensors", **args)
    again = loaded(tmp_path / "out")
    assert again.num_flop_blocks == 1 and torch.equal(again(torch.ones(1, 3, 32, 32)), model(torch.ones(1, 3, 32, 32)))


@pytest.mark.parametrize("args", [{"in_chans": 1}, {"patch_size": 4}, {"in_chans": 5, "patch_size": (16, 4)}])
@pytest.mark.parametrize("name", [name for name in NETWORKS if name != X])
def test_channels_and_patches_of_a_checkpoint_are_those_of_the_folder(name, args, tmp_path, monkeypatch):
    args = SMALL[NETWORKS[name]] | {"img_size": 32, "num_classes": 5} | args
    model = weights_of(name, tmp_path / "w.safetensors", **args)
    given = {key: value for key, value in args.items() if key not in ("in_chans", "patch_size", "num_classes")}
    folder = tmp_path / "out"
    export_model(name, folder, checkpoint=tmp_path / "w.safetensors", **given)
    images = torch.randn(2, args.get("in_chans", 3), 32, 32)
    assert torch.equal(loaded(folder)(images), model(images))
    monkeypatch.setattr("timm.models._hub.hf_hub_download", lambda repo_id, filename, **kwargs: str(folder / filename))
    assert torch.equal(timm.create_model("hf-hub:org/name", pretrained=True).eval()(images), model(images))


@pytest.mark.parametrize("name", ["flop_deit3_base_patch16_224", "flop_resmlp_24_224", "flophybrid_convnext_iso_small"])
def test_a_folder_loads_with_other_channels_and_classes(name, tmp_path):
    args = SMALL[MODELS[name].family] | ARGS
    model = weights_of(name, tmp_path / "w.safetensors", **args)
    export_model(name, tmp_path / "out", checkpoint=tmp_path / "w.safetensors", **args)
    grey = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True, in_chans=1).eval()
    image = torch.randn(2, 1, 32, 32)
    torch.testing.assert_close(grey(image), model(image.expand(-1, 3, -1, -1)), atol=1e-4, rtol=1e-4)
    assert timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True, num_classes=9).eval()(
        image.expand(-1, 3, -1, -1)
    ).shape == (2, 9)


def test_a_resized_model_is_saved_with_its_sizes(tmp_path):
    model = randomize_parameters(build(E, **SMALL["vit"] | ARGS)).eval()
    model.set_input_size((16, 24), patch_size=4)
    timm.models.save_for_hf(model, str(tmp_path), safe_serialization=True)
    images = torch.randn(2, 3, 16, 24)
    assert torch.equal(loaded(tmp_path)(images), model(images))


@pytest.fixture
def run(tmp_path):
    """The folder of a trained run, as the pipeline writes it."""
    folder = tmp_path / "outputs" / "e-vit"
    folder.mkdir(parents=True)
    args = SMALL["vit"] | {"img_size": 32, "patch_size": 8}
    weights_of(E, folder / "weights.safetensors", num_classes=7, **args)
    config = {
        "run": "e-vit", "model": E, "args": args, "seed": 3,
        "data": {"name": "digits", "image_size": 32, "interpolation": "bilinear", "mean": [0.5, 0.5, 0.5],
                 "std": [0.2, 0.2, 0.2], "further_val": {"other": "data/other", "gone": "data/gone"}},
        "recipe": {"name": "quick", "epochs": 60, "lr": 0.002, "auto_augment": None, "test_crop_ratio": 0.9},
        "train": {"workers": [1, 4], "cpus_per_worker": 2, "amp": "bf16", "compile": True},
    }  # fmt: skip
    (folder / "config.yaml").write_text(json.dumps(config))  # JSON is YAML
    metrics = {
        "val/top1_pct": 97.2222,
        "val/flop_agreement_pct": 100.0,
        "val/real_top1_pct": None,
        "converged": True,
        "equivariance/max_rel_error": 3.1e-7,
        "val/loss": float("nan"),
        "other/top1_pct": 88.88,
    }
    (folder / "metrics.json").write_text(json.dumps(metrics))
    notes = {"run": "e-vit", "mlflow_run_id": "3ca57", "fingerprint": "aa46", "status": "finished", "best_epoch": 47}
    (folder / "run.json").write_text(json.dumps(notes))
    return folder


def test_a_trained_run_brings_model_weights_preprocessing_and_figures(run, tmp_path):
    export_model(None, tmp_path / "out", run=run)
    model = loaded(tmp_path / "out")
    data = timm.data.resolve_model_data_config(model)
    assert model.num_classes == 7
    assert (data["interpolation"], list(data["std"]), data["crop_pct"]) == ("bilinear", [0.2, 0.2, 0.2], 0.9)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "# e-vit: E(ViT)\n" in card and "seed 3" in card and "epoch 47" in card
    assert "| top-1 | 97.2 % |" in card and "| lr | 0.002 |" in card and "| auto_augment | off |" in card
    assert "ReaL" not in card and "| loss" not in card and "images/s" not in card
    assert "| equivariance error of the logits | 3.1e-07 |" in card and "MLflow 3ca57, configuration aa46" in card
    assert "| top-1 on other, never trained or chosen on | 88.9 % |" in card and "top-1 on gone" not in card
    assert "Workers: 1 to 4, of 2 CPU cores each; mixed precision bf16, compiled." in card
    assert 'create_model("local-dir:<this folder>"' in card and "flopeq export" not in card
    [error] = measure_equivariance_errors(model, (3, 32, 32)).values()
    assert f"| equivariance error of the logits under the flop, float64, two random images | {error:.1e} |" in card
    assert card.startswith("---\nlibrary_name: timm\n")
    assert yaml.safe_load(card.split("---\n")[1])["datasets"] == ["digits"]
    assert "did not converge" not in card


def test_the_card_reports_a_diverged_run(run, tmp_path):
    (run / "metrics.json").write_text(json.dumps({"converged": False}))
    export_model(None, tmp_path / "out", run=run)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "did not converge" in card and "Not evaluated" in card


def test_the_card_of_untrained_weights_separates_them_from_the_papers_accuracy():
    metrics = {"complexity/params_m": 11.2, "complexity/gflops": 2.3, "equivariance/float64_error/flop": 0.0}
    text = render_card("flop_convnext_iso_small", {}, (3, 224, 224), metrics, weights="random, untrained")
    assert "random, untrained" in text and "# E(ConvNeXt-S (iso.))" in text and "| parameters | 11.2 M |" in text
    assert "(its weights, not these) | 76.8 % |" in text and "multiply-adds" not in text and "## Training" not in text


def test_a_run_without_evaluation_is_not_reported_as_failed(run, tmp_path):
    (run / "metrics.json").unlink()
    export_model(None, tmp_path / "out", run=run)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Not evaluated." in card and "did not converge" not in card


def test_the_weights_licence_is_the_one_given(run, tmp_path):
    export_model(None, tmp_path, run=run, license="cc-by-nc-4.0")
    assert "license: cc-by-nc-4.0" in (tmp_path / "README.md").read_text()
    assert json.loads((tmp_path / "config.json").read_text())["pretrained_cfg"]["license"] == "cc-by-nc-4.0"


@pytest.mark.parametrize("words, message", [
    (("flop_deit3_smal_patch16_224", "{out}"), "did you mean"),
    ((E, "{out}", "detph=3"), "did you mean 'depth'"),
    ((E, "{out}", "--checkpoint", "{out}/none.safetensors"), "there is no file"),
    ((X, "{out}", "--checkpoint", "{weights}"), "does not fit"),
    ((X, "{out}", "--run", "{run}"), f"is a run of {E}"),
    (("{out}", "--run", "{out}"), "not a trained run"),
    (("{out}", "--run", "{run}", "--checkpoint", "{out}/other.safetensors"), "leave one of them out"),
    ((E,), "MODEL OUT_DIR"),
])  # fmt: skip
def test_errors_are_one_line(words, message, run, tmp_path, capsys):
    places = {"out": tmp_path / "out", "weights": run / "weights.safetensors", "run": run}
    with pytest.raises(SystemExit) as stop:
        main(["export", *(word.format(**places) for word in words)])
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.startswith("error: ") and message in err and len(err.splitlines()) == 1


def test_the_command_prints_what_it_wrote(run, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["export", "--run", str(run), str(tmp_path / "out"), "--json"])
    [written] = json.loads(capsys.readouterr().out)
    assert stop.value.code == 0
    assert written["model"] == E and written["equivariance_error"] < 1e-12
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"README.md", "config.json", "model.safetensors"}
