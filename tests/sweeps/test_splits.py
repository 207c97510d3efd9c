"""The networks of the split sweep: hybrids of every group, and groups by depth."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flopeq.models.build import build
from flopeq.testing import feature_groups
from pipeline.base import config
from pipeline.base.errors import ConfigError
from pipeline.base.yaml_files import dump_yaml, read_yaml
from pipeline.sweeps.analysis import format_splits
from pipeline.sweeps.search_space import check_search_space
from pipeline.sweeps.splits import split_run, splits_to_try

ROOT = Path(__file__).resolve().parents[2]

VIT = "deit3_small_patch16_224"


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., config.Experiment]:
    """The committed experiment with other splits for a network of three blocks, and another recipe sweep."""

    def load(model: str, splits: Any, args: dict[str, Any] | None = None, **recipe: Any) -> config.Experiment:
        params = read_yaml(ROOT / "params.yaml")
        run = {**params["models"]["vit"], "model": model}
        params["models"]["net"] = {**run, "args": {**run["args"], **(args or {})}}
        params["sweeps"]["hybrid"] |= {"runs": ["net"], "splits": splits}
        params["sweeps"]["recipe"] |= {"runs": ["net"], "own_space": {}, **recipe}
        (tmp_path / "params.yaml").write_text(dump_yaml(params))
        return config.load_experiment(tmp_path / "params.yaml")

    return load


@pytest.mark.parametrize(
    ("model", "args", "split", "groups"),
    [
        (VIT, {}, 2, ["c2", "c2", "trivial"]),
        (f"mirrorshybrid_{VIT}", {"num_group_blocks": 1}, 2, ["c2xc2", "c2xc2", "trivial"]),
        (f"octichybrid_{VIT}", {"symmetry": "d4:3"}, 1, ["d4", "trivial", "trivial"]),
        (VIT, {}, "d4:1,c2:2", ["d4", "c2", "c2"]),
        (f"flophybrid_{VIT}", {"num_flop_blocks": 1}, "d4:1,c2:1", ["d4", "c2", "trivial"]),
    ],
)
def test_a_split_gives_every_block_its_group(load, model: str, args: dict, split: Any, groups: list[str]) -> None:
    run = split_run(load(model, [split], args), "net", split)
    assert [group.name for group in feature_groups(build(run.model, "meta", **run.args))] == groups


def test_numbers_come_first_and_all_is_from_x_to_e(load) -> None:
    splits = ["d4:1,c2:2", 3, 0, 3, "d4:1,c2:2", "d4:3"]
    assert splits_to_try(load(VIT, splits), "net") == [0, 3, "d4:1,c2:2", "d4:3"]
    assert splits_to_try(load(f"octichybrid_{VIT}", "all"), "net") == [0, 1, 2, 3]
    assert format_splits([0, 3, "d4:1,c2:2"]) == "k = 0, 3 and d4:1,c2:2"


@pytest.mark.parametrize(
    ("model", "splits", "message"),
    [
        (VIT, ["c2:1,d4:2"], "sweeps.hybrid.splits: .*d4 cannot follow c2"),
        (VIT, ["d4:2,c2:2"], "sweeps.hybrid.splits: .*names 4 blocks, but the depth is 3"),
        (f"octichybrid_{VIT}", [4], "4 is beyond the 3 blocks of net"),
        (f"octic_{VIT}", [1], "net is neither X nor a hybrid"),
    ],
)
def test_a_split_that_cannot_be_built_is_refused_before_the_sweep(load, model: str, splits: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        splits_to_try(load(model, splits), "net")


def test_groups_by_depth_are_a_choice_of_the_recipe_sweep(load) -> None:
    space = {"args.symmetry": {"choice": ["d4:1,c2:2", "d4:2,c2:1"]}}
    check_search_space(load(f"octic_{VIT}", [1], space=space))
    with pytest.raises(ConfigError, match="args.symmetry: 'c2:1,d4:2' for run net: .*d4 cannot follow c2"):
        check_search_space(load(f"octic_{VIT}", [1], space={"args.symmetry": {"choice": ["c2:1,d4:2"]}}))
