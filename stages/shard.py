"""Writes the shards of data.source: tars, indices, manifest."""

from __future__ import annotations

import logging

from pipeline import config
from stages import main, prepare


def run() -> None:
    experiment = config.load()
    data = experiment.data
    prepare.ensure(data)

    from pipeline import shard

    manifest = shard.write_shards(
        data.source, data.shards, images_per_shard=data.images_per_shard, seed=experiment.seed
    )
    logging.info("%s: %d training and %d validation images of %d classes, %d re-encoded, %d files skipped",
                 data.shards, manifest.counts["train"], manifest.counts["val"], len(manifest.classes),
                 len(manifest.reencoded), len(manifest.skipped))


if __name__ == "__main__":
    main(run)
