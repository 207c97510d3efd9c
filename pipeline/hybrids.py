"""The hybrids of a family: which split points there are, and the model of each."""

from __future__ import annotations

from flopeq.build import build
from flopeq.registry import PREFIXES, describe
from flopeq.variants import baseline_of
from pipeline.config import ConfigError, Experiment, Run


def hybrid(experiment: Experiment, run_name: str, num_flop_blocks: int) -> Run:
    """The run of a family, with its model split after so many blocks."""
    run = experiment.run(run_name)
    name = PREFIXES["H"] + baseline_of(run.model)
    return run.model_copy(update={"model": name, "args": {**run.args, "num_flop_blocks": num_flop_blocks}})


def splits_of(experiment: Experiment, run_name: str) -> list[int]:
    """The numbers of equivariant blocks to try for a family.

    Raises: ConfigError for a run that is neither X nor H, and for a number beyond the depth.
    """
    run, wanted = experiment.run(run_name), experiment.sweeps.hybrid.splits
    info = describe(run.model)
    if info is None or info.variant == "E":
        raise ConfigError(f"sweeps.hybrid.runs: {run_name} is no X or H, of which there would be a hybrid")
    args = {key: value for key, value in run.args.items() if key != "num_flop_blocks"}
    blocks = build(PREFIXES["H"] + baseline_of(run.model), device="meta", **args).get_submodule("blocks")
    depth = len(list(blocks.children()))
    splits = list(range(depth + 1)) if wanted == "all" else sorted(set(wanted))
    if splits[-1:] > [depth]:
        raise ConfigError(f"sweeps.hybrid.splits: {splits[-1]} is beyond the {depth} blocks of {run_name}")
    return splits
