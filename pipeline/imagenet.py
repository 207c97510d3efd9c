"""ImageNet's 1,000 classes, in the order that fixes their labels: sorted wnids (Russakovsky et al. 2015, ILSVRC2012).

The devkit's own numbering (ILSVRC ids) is in another order, and is never a label here.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from functools import cache

WNID = re.compile(r"n\d{8}")
"""A WordNet synset: part of speech, then offset."""
COUNTS = {"train": 1_281_167, "val": 50_000}
"""Images of each split."""


@cache
def wnids() -> tuple[str, ...]:
    """The 1,000 wnids in the order of their labels, from timm's table."""
    from timm.data import ImageNetInfo  # imports torch

    return tuple(ImageNetInfo().label_names())


def all_there(classes: Collection[str]) -> bool:
    """Whether these are the 1,000 classes, in any order."""
    return len(classes) == 1000 and set(classes) == set(wnids())
