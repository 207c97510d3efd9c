"""Lists checkpoints and trials that nothing uses any more: `python -m stages.prune [run ...] [--delete]`.

A training never deletes what another configuration left: after a change of code, parameters or packages, the former
checkpoints stay. Used are those of the configuration as it is now, those of the weights in outputs/<run>/, and the
trials of a sweep's last outcome. With --delete, the others are deleted.
"""

from __future__ import annotations

import argparse
import logging
import shutil
from pathlib import Path

from pipeline.base import config
from pipeline.base.errors import ConfigError
from stages import run_stage

_GIB = 1 << 30


def run(*words: str) -> None:
    args = _parser().parse_args(words)
    experiment = config.load_experiment()
    from pipeline.sweeps import trial
    from pipeline.training import pruning

    num_bytes = 0
    for name in args.runs or experiment.models:
        try:
            unused = pruning.list_unused(experiment, name)
        except ConfigError as error:  # the recipe is not known yet, so any checkpoint may be the current one
            logging.info("%s: kept, because %s", name, error)
            continue
        for run_dir, differences in unused:
            size, steps = run_dir.num_bytes(), run_dir.list_checkpoints()
            num_bytes += size
            found = steps[-1] if steps else "no checkpoint"
            logging.info("%s  %.2f GiB  %s  %s", run_dir.storage, size / _GIB, found, "; ".join(differences))
            if args.delete:
                pruning.delete_unused(run_dir)
    for trials_dir in sorted(Path("sweeps/trials").glob("*/")) if not args.runs else ():
        for path in trial.list_unused_trials(trials_dir):
            num_bytes += sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
            logging.info("%s  a trial of another configuration", path)
            if args.delete:
                shutil.rmtree(path)
    action = "deleted" if args.delete or not num_bytes else "not used: `--delete` deletes it"
    logging.info("%.2f GiB %s", num_bytes / _GIB, action)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m stages.prune", description=__doc__)
    parser.add_argument("runs", nargs="*", help="names in params.yaml; without them, all runs and sweeps")
    parser.add_argument("--delete", action="store_true", help="delete what is listed")
    return parser


if __name__ == "__main__":
    run_stage(run)
