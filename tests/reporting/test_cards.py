"""Model cards: what the model is, and the same text as in an exported folder."""

from __future__ import annotations

from pathlib import Path

import yaml
from safetensors.torch import save_file

from flopeq.hub.export import export_model
from flopeq.models.build import build
from pipeline.base.yaml_files import dump_yaml
from pipeline.reporting import page, run_results
from tests.reporting.conftest import diverge, load_results, write_fake_study


def test_card_says_what_the_model_is_and_does(tmp_path: Path) -> None:
    experiment = write_fake_study(tmp_path)
    diverge(tmp_path / "outputs/h-vit")
    results = load_results(tmp_path, experiment)
    _, header, text = page.render_run_card(results["e-vit"], experiment).split("---\n", 2)
    assert yaml.safe_load(header) == {
        "library_name": "timm", "pipeline_tag": "image-classification", "license": "apache-2.0",
        "tags": ["image-classification", "timm", "equivariance", "flopeq"], "datasets": ["digits"],
    }  # fmt: skip
    assert "`flop_deit3_small_patch16_224`" in text and "embed_dim=64" in text in text
    assert "| top-1 | 96.1 % (95% interval 94.7 to 97.1) |" in text
    assert "| top-1 minus that of X, same images | -2.50 points (95% interval -3.50 to -1.60) |" in text
    assert "| McNemar's exact test of that difference, p | <0.001 |" in text and "seeds" not in text
    assert "equivariant to horizontal mirroring" in text and "| 3.1e-07 |" in text
    assert "| images/s forward (cpu, float32, batch 64, compiled) | 24,000 |" in text
    assert "over these | 1.83 |" in text and "| images/s over those of X | 1.20 |" in text
    assert "float64" not in text and f"MLflow {'0' * 32}, configuration f." in text
    assert "$ flopeq export --run outputs/e-vit exported/e-vit\n" in text and '"local-dir:exported/e-vit"' in text
    assert "| lr | 0.002 |" in text and "Workers: 1, of 1 CPU core each" in text and "## Intended use" in text
    assert "did not converge" not in text
    failed = page.render_run_card(results["h-vit"], experiment)
    assert "**It did not converge: it diverged (loss nan in epoch 1 at step 5, lr 0.1)" in failed
    assert "A hybrid" in failed
    assert "| equivariance error of" not in failed and "| loss | ce |" in failed and failed.count("| loss |") == 1
    unmeasured = run_results.load_results(experiment, tmp_path / "nowhere", tmp_path / "nowhere")[0]
    bare = page.render_run_card(unmeasured, experiment)
    assert "no validation accuracy" in bare and "Not evaluated." in bare
    assert "| parameters |" not in bare and "images/s" not in bare and "MLflow" not in bare


def test_an_exported_folder_and_the_report_say_the_same_of_a_run(tmp_path: Path) -> None:
    experiment = write_fake_study(tmp_path)
    folder = tmp_path / "outputs/e-vit"
    resolved = experiment.resolved("e-vit")
    (folder / "config.yaml").write_text(dump_yaml(resolved))
    save_file(build(resolved["model"], num_classes=10, **resolved["args"]).state_dict(), folder / "weights.safetensors")
    export_model(None, tmp_path / "exported", run=folder)
    exported = (tmp_path / "exported/README.md").read_text()
    reported = page.render_run_card(load_results(tmp_path, experiment)["e-vit"], experiment)
    for start, end in (("---\n", "\n# "), ("## Training", "## Use"), ("## Intended use", "```bibtex")):
        part = reported[reported.index(start) : reported.index(end)]
        assert len(part) > 50 and exported[exported.index(start) : exported.index(end)] == part
