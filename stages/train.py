"""Trains one run of the experiment: `python -m stages.train <run>`."""

from __future__ import annotations

from pipeline import config
from stages import main


def run(run_name: str) -> None:
    experiment = config.load()
    experiment.run(run_name)
    from pipeline import shard, train

    shard.verify(experiment.data.shards)
    train.train(experiment, run_name)


if __name__ == "__main__":
    main(run)
