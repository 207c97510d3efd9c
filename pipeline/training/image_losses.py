"""The loss of every validation image after a training, and of the prediction averaged over an image and its flop."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from pipeline.loading.batching import Batch


@dataclass(frozen=True)
class ImageLosses:
    """Cross-entropy without smoothing, in nats, and whether the top-1 class is right, for every image, in order."""

    losses: NDArray[np.float64]
    """(num_images,)"""
    hits: NDArray[np.bool_]
    """(num_images,)"""
    averaged_losses: NDArray[np.float64] | None = None
    """(num_images,), of the mean of both probabilities; None if not measured."""
    averaged_hits: NDArray[np.bool_] | None = None


@torch.inference_mode()
def measure_image_losses(model: nn.Module, batches: Iterable[Batch], *, average_over_flop: bool) -> ImageLosses:
    """Evaluates a model in float32 on labelled batches, in evaluation mode.

    Args:
        average_over_flop: whether to measure the mean of the softmax of each image and of its flop, too.
    """
    model.eval()
    columns: list[list[Tensor]] = [[], [], [], []]
    for batch in batches:
        log_probs = [F.log_softmax(model(batch.images).double(), dim=1)]
        if average_over_flop:
            flopped = F.log_softmax(model(batch.images.flip(-1)).double(), dim=1)
            log_probs.append(torch.logaddexp(log_probs[0], flopped) - math.log(2))
        for number, log_prob in enumerate(log_probs):
            columns[2 * number].append(F.nll_loss(log_prob, batch.labels, reduction="none").cpu())
            columns[2 * number + 1].append((log_prob.argmax(1) == batch.labels).cpu())
    return ImageLosses(*(torch.cat(column).numpy() if column else None for column in columns))  # type: ignore


def concatenate(parts: Iterable[ImageLosses]) -> ImageLosses:
    """Joins the parts of several workers, in their order. A worker may have none of the images."""
    columns = zip(
        *(
            (part.losses, part.hits, part.averaged_losses, part.averaged_hits)
            for part in parts
            if part.losses is not None
        ),
        strict=True,
    )
    return ImageLosses(*(None if column[0] is None else np.concatenate(column) for column in columns))  # type: ignore
