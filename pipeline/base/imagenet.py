"""ImageNet's 1,000 classes (Russakovsky et al. 2015, ILSVRC2012); labels are indices into the sorted wnids.

The devkit numbers the classes in another order (ILSVRC ids). These numbers are never used as labels here.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from functools import cache

WNID_PATTERN = re.compile(r"n\d{8}")
"""Matches a WordNet id (wnid): the part of speech, then the offset of the synset."""

NUM_IMAGES = {"train": 1_281_167, "val": 50_000}
"""Number of images in each split."""


@cache
def wnids() -> tuple[str, ...]:
    """Returns the 1,000 wnids in the order of their labels, from timm's table."""
    from timm.data import ImageNetInfo  # imports torch

    return tuple(ImageNetInfo().label_names())


def has_all_classes(classes: Collection[str]) -> bool:
    """Whether the given wnids are exactly the 1,000 classes, in any order."""
    return len(classes) == 1000 and set(classes) == set(wnids())
