"""The scaling study: trains every arm of `scaling` in every size for every budget, and fits how they compare.

`python -m stages.scaling` trains what is missing and writes scaling/. With `--refit`, the fits and figures of a folder
are computed again from its `runs.csv` and `losses.parquet`, in seconds.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from pipeline.base.errors import ConfigError
from stages import run_stage


def run(*words: str) -> None:
    """Raises: ConfigError if there is no study to refit in the folder."""
    args = _parser().parse_args(words)
    if args.refit is not None:
        _refit(args.refit)
        return
    from stages import load_experiment

    experiment = load_experiment()
    if experiment.scaling is not None:
        from pipeline import cluster

        cluster.connect(cpus=experiment.scaling.cpus(experiment.train))
    from pipeline.scaling import study  # imports Ray, which `connect` must do first

    study.run_study(experiment)


def _refit(folder: Path) -> None:
    if not (folder / "runs.csv").is_file():
        raise ConfigError(f"{folder / 'runs.csv'} not found: --refit takes a folder that this stage has written")
    from pipeline.scaling import analysis

    analysis.refit(folder)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m stages.scaling", description=__doc__)
    parser.add_argument(
        "--refit",
        nargs="?",
        type=Path,
        const=Path("scaling"),
        metavar="FOLDER",
        help="train nothing: fit the runs of this folder again (without a folder: scaling)",
    )
    return parser


if __name__ == "__main__":
    run_stage(run)
