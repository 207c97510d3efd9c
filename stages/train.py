"""Trains one run of the experiment: `python -m stages.train <run>`.

If the run was trained before, with everything as it is now, only its outputs are written again, within seconds.
"""

from __future__ import annotations

import argparse
from contextlib import nullcontext

from stages import load_experiment, run_stage


def run(*words: str) -> None:
    args = _parser().parse_args(words)
    run_name = args.run
    experiment = load_experiment()
    experiment.check_is_trained(run_name)
    from pipeline import cluster
    from pipeline.shards import verify
    from pipeline.training import failures, outputs

    with failures.note_failure(run_name) if args.adopt is None else nullcontext():
        verify.verify_changed(experiment.data.shards)
        if args.adopt is None and outputs.write_finished_outputs(experiment, run_name):
            return
        cluster.connect(cpus=experiment.train.least_workers * experiment.train.cpus_per_worker)
        from pipeline.training import trainer  # imports Ray, which `connect` must do first

        trainer.train_run(experiment, run_name, adopt=args.adopt)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m stages.train", description=__doc__)
    parser.add_argument("run", help="its name in params.yaml")
    parser.add_argument(
        "--adopt",
        metavar="FINGERPRINT",
        help="continue from the latest checkpoint of another configuration of this run, which run.json records",
    )
    return parser


if __name__ == "__main__":
    run_stage(run)
