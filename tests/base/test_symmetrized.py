"""Symmetrized runs in params.yaml: what they mean, and mistakes in them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline.base import config
from pipeline.base.errors import ConfigError
from pipeline.base.yaml_files import dump_yaml, read_yaml

ROOT = Path(__file__).resolve().parents[2]


def load(folder: Path, **runs: dict[str, Any]) -> config.Experiment:
    params = read_yaml(ROOT / "params.yaml") | {"symmetrized": runs}
    (folder / "params.yaml").write_text(dump_yaml(params))
    return config.load_experiment(folder / "params.yaml")


VIT = {"weights_of": "vit", "group": "flop"}


def test_it_has_model_recipe_and_seed_of_the_run_whose_weights_it_uses(tmp_path):
    experiment = load(tmp_path, **{"vit-sym": VIT})
    assert experiment.run_names == [*experiment.models, "vit-sym"]
    assert experiment.run("vit-sym") == experiment.run("vit")
    assert (experiment.trained_name("vit-sym"), experiment.trained_name("vit")) == ("vit", "vit")
    assert experiment.recipe("vit-sym") == experiment.recipe("vit")
    resolved, trained = experiment.resolved("vit-sym"), experiment.resolved("vit")
    assert resolved == {**trained, "run": "vit-sym", "symmetrize": {**VIT, "how": "average"}}
    assert "symmetrize" not in trained, "the fingerprint of a training would change"
    experiment.check_is_trained("vit")
    with pytest.raises(ConfigError, match="vit-sym is not trained: it has the weights of vit"):
        experiment.check_is_trained("vit-sym")
    with pytest.raises(ConfigError, match="no run named 'vit-sim' in params.yaml; did you mean 'vit-sym'"):
        experiment.run("vit-sim")


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        ({"a": VIT | {"weights_of": "vitt"}}, "symmetrized.a.weights_of: no run named 'vitt'; did you mean 'vit'?"),
        ({"a": VIT, "b": VIT | {"weights_of": "a"}}, "symmetrized.b.weights_of: a is symmetrized itself"),
        ({"e-vit": VIT}, "symmetrized.e-vit: `models` already has this name"),
        ({"a": VIT | {"recipe": "digits"}}, "symmetrized.a.recipe: unknown parameter; known: weights_of, group, how"),
        ({"a": VIT | {"seed": 1}}, "symmetrized.a.seed: unknown parameter"),
        ({"a": VIT | {"how": "weighted"}}, "symmetrized.a.how: .*'average', 'choose' or 'canonical', got 'weighted'"),
        ({"a": {"weights_of": "vit"}}, "symmetrized.a.group: missing"),
    ],
)
def test_mistakes_are_named(runs, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        load(tmp_path, **runs)


def test_a_file_without_the_section_is_told_so(tmp_path):
    params = {key: value for key, value in read_yaml(ROOT / "params.yaml").items() if key != "symmetrized"}
    (tmp_path / "params.yaml").write_text(dump_yaml(params))
    with pytest.raises(ConfigError, match="symmetrized: missing"):
        config.load_experiment(tmp_path / "params.yaml")


def test_no_training_depends_on_symmetrized_runs():
    stages = read_yaml(ROOT / "dvc.yaml")["stages"]
    for name in ("recipe", "tuned", "train", "evaluate", "sweep_recipe", "sweep_hybrid", "scaling"):
        described = stages[name].get("do", stages[name])
        assert "symmetriz" not in dump_yaml(described), name
