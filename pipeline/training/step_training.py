"""A training of a number of steps instead of epochs, on some of the images: a trial of the scaling study.

To the training loop it is one epoch. It ends in the middle of a pass over the images, is validated at its end only, and
resumes from a checkpoint at any step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # a trial's specification is read where torch should not be loaded
    from pipeline.loading.batching import Batch


@dataclass(frozen=True)
class StepTraining:
    """The length and the images of a training whose recipe has one epoch."""

    steps: int
    """Number of optimizer steps."""
    warmup_steps: int
    """Number of steps of linear warm-up."""
    unique_images: int
    """Number of different training images: the size of a class-stratified subset."""
    transpose: bool = False
    """Whether the network sees every image transposed."""
    average_over_flop: bool = False
    """Whether to measure the prediction averaged over each validation image and its flop, too."""

    def iterate(
        self, pass_batches: Callable[[int, int], Iterable[Batch]], start_step: int, steps_per_pass: int
    ) -> Iterator[Batch]:
        """Yields the batches from a step to the last one as the network sees them, pass after pass over the images.

        Args:
            pass_batches: (number of the pass, its first step) -> the batches of the rest of this pass.
        """
        step = start_step
        while step < self.steps:
            for batch in self.orient(pass_batches(*divmod(step, steps_per_pass))):
                yield batch
                step += batch.ends_step
                if step == self.steps:
                    return

    def orient(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Yields the batches as the network sees them."""
        for batch in batches:
            yield batch._replace(images=batch.images.mT.contiguous()) if self.transpose else batch
