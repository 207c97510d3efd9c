"""The networks of the split sweep: numbers of equivariant blocks of a hybrid, and groups by depth."""

from __future__ import annotations

from typing import Any

from flopeq.models.build import ModelError, build
from flopeq.models.variants import baseline_name
from flopeq.registry import PREFIXES, describe
from pipeline.base.config import Experiment
from pipeline.base.errors import ConfigError
from pipeline.base.schema import Run, Split

_ARGUMENTS = {"H": "num_flop_blocks", "H-C2xC2": "num_group_blocks", "H-D4": "num_group_blocks"}
"""The argument of each kind of hybrid that is its number of equivariant blocks."""

_GRADED = "D4"  # every model for a larger group takes any `symmetry`


def split_args(experiment: Experiment, run_name: str, split: Split) -> dict[str, Any]:
    """Returns the arguments that make the split: the number of equivariant blocks, or the groups by depth."""
    return {"symmetry": split} if isinstance(split, str) else {_ARGUMENTS[_hybrid(experiment, run_name)]: split}


def split_run(experiment: Experiment, run_name: str, split: Split) -> Run:
    """Returns the run with the network of a split.

    A number of equivariant blocks is that of a hybrid for the run's group, which is the flop's for X. A text such as
    "d4:4,c2:8" gives every block its group.
    """
    run = experiment.run(run_name)
    prefix = PREFIXES[_GRADED if isinstance(split, str) else _hybrid(experiment, run_name)]
    args = {key: value for key, value in run.args.items() if key not in (*_ARGUMENTS.values(), "symmetry")}
    args |= split_args(experiment, run_name, split)
    return run.model_copy(update={"model": prefix + baseline_name(run.model), "args": args})


def splits_to_try(experiment: Experiment, run_name: str) -> list[Split]:
    """Returns the splits to try for a family, the numbers of equivariant blocks first.

    Raises: ConfigError for a run that is neither X nor a hybrid, for a number above the depth, and for groups that the
    model does not take.
    """
    requested = experiment.sweeps.hybrid.splits
    blocks = build(**_network(split_run(experiment, run_name, 0))).get_submodule("blocks")
    depth = len(list(blocks.children()))
    if requested == "all":
        return list(range(depth + 1))
    numbers = sorted({split for split in requested if isinstance(split, int)})
    if numbers[-1:] > [depth]:
        raise ConfigError(f"sweeps.hybrid.splits: {numbers[-1]} is beyond the {depth} blocks of {run_name}")
    texts = list(dict.fromkeys(split for split in requested if isinstance(split, str)))
    for text in texts:
        try:
            build(**_network(split_run(experiment, run_name, text)))
        except ModelError as error:
            raise ConfigError(f"sweeps.hybrid.splits: {error}") from None
    return [*numbers, *texts]


def _network(run: Run) -> dict[str, Any]:
    return {"name": run.model, "device": "meta", **run.args}


def _hybrid(experiment: Experiment, run_name: str) -> str:
    """Returns the variant of the hybrids with a number of equivariant blocks. Raises: ConfigError as above."""
    info = describe(experiment.run(run_name).model)
    if info is None or info.variant not in ("X", *_ARGUMENTS):
        raise ConfigError(f"sweeps.hybrid.runs: {run_name} is neither X nor a hybrid")
    return "H" if info.variant == "X" else info.variant
