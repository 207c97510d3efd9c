"""Writes the shards of data.source, or indexes those that it names: tars, indices, manifest."""

from __future__ import annotations

import logging
import os

from pipeline import config
from stages import main, prepare


def run() -> None:
    experiment = config.load()
    data = experiment.data
    prepare.ensure(data)

    from pipeline import shard, verify

    manifest = shard.write(
        data.source, data.shards, images_per_shard=data.images_per_shard, seed=experiment.seed, labels=data.labels,
        on_bad_image=data.on_bad_image,
    )
    os.sync()
    verify.remember(data.shards)
    logging.info("%s: %d training and %d validation images of %d classes in %d shards", data.shards,
                 manifest.counts["train"], manifest.counts["val"], len(manifest.classes), len(manifest.shards))
    if manifest.oddities:
        found = ", ".join(f"{count} {kind}" for kind, count in manifest.oddities.items())
        logging.info("%s lists by name: %s", data.shards / shard.ODDITIES, found)
    if manifest.skipped:
        logging.warning("%d bad images were left out", len(manifest.skipped))
    if manifest.ignored:
        logging.info("%d files of %s are no images, such as %s", len(manifest.ignored), data.source,
                     manifest.ignored[0])


if __name__ == "__main__":
    main(run)
