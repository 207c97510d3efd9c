"""Measures one trained run on the validation split: `python -m stages.evaluate <run>`."""

from __future__ import annotations

import logging

from pipeline import config
from stages import main


def run(run_name: str) -> None:
    experiment = config.load()
    experiment.run(run_name)
    from pipeline import evaluate, verify

    verify.verify_changed(experiment.data.shards)
    metrics = evaluate.evaluate(experiment, run_name)
    logging.info("%s  %s", run_name, "  ".join(f"{name} {value:.6g}" for name, value in metrics.items()))


if __name__ == "__main__":
    main(run)
