"""Packs data.source into shards, or indexes existing ones: tars, indices, manifest."""

from __future__ import annotations

import logging
import os

from pipeline.base import config
from pipeline.packing.sources import digits
from stages import run_stage, workspace


def run() -> None:
    experiment = config.load_experiment()
    data = experiment.data
    if workspace.link_shards(data.shards):
        return
    digits.open_source(data)

    from pipeline.packing import pack
    from pipeline.shards import verify

    manifest = pack.pack_source(
        data.source,
        data.shards,
        images_per_shard=data.images_per_shard,
        seed=experiment.seed,
        labels=data.labels,
        class_names=data.class_names,
        on_bad_image=data.on_bad_image,
    )
    os.sync()
    verify.mark_verified(data.shards)
    logging.info(
        "%s: %d training and %d validation images of %d classes in %d shards",
        data.shards,
        manifest.counts["train"],
        manifest.counts["val"],
        len(manifest.classes),
        len(manifest.shards),
    )
    if manifest.oddities:
        found = ", ".join(f"{count} {kind}" for kind, count in manifest.oddities.items())
        logging.info("%s lists by name: %s", data.shards / pack.ISSUES_FILE, found)
    if manifest.skipped:
        logging.warning("%d bad images were skipped", len(manifest.skipped))
    if manifest.ignored:
        logging.info(
            "%d files of %s are not images, such as %s", len(manifest.ignored), data.source, manifest.ignored[0]
        )


if __name__ == "__main__":
    run_stage(run)
