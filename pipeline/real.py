"""ReaL, ImageNet's validation images with all labels that hold for each (Beyer et al. 2020); timm ships them.

An image may have several labels, or none that holds, and does not count then.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from pipeline import imagenet

_KEY = re.compile(r"ILSVRC2012_val_\d{8}(?!\d)")
_NUM_IMAGES = 50_000

Labels = list[list[int]]
"""All labels of each image, by row."""


def labels(classes: Sequence[str], keys: Sequence[str]) -> Labels | None:
    """The labels of the images of those keys; None where there are none.

    There are if the classes are ImageNet's 1,000 in their order, and every image is one of its validation images.
    """
    if tuple(classes) != imagenet.wnids():
        return None
    names = [f"{found[0]}.JPEG" for key in keys if (found := _KEY.search(key))]
    if len(names) < len(keys):
        return None
    from timm.data import RealLabelsImagenet

    known: dict[str, list[int]] = RealLabelsImagenet(range(_NUM_IMAGES)).real_labels  # it only counts the names
    found = [known[name] for name in names if name in known]
    return found if len(found) == len(keys) and any(found) else None


def top1_pct(predicted: Sequence[int], labels: Labels) -> float:
    """Share, in percent, of the images with labels whose predicted class is one of them."""
    hits = [class_ in allowed for class_, allowed in zip(predicted, labels, strict=True) if allowed]
    return 100 * sum(hits) / len(hits)
