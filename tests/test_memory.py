"""The largest batch that fits, against a model that runs out of memory at a size of our choice."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pipeline import memory
from pipeline.config import ConfigError, Recipe, load


class Small(nn.Module):
    """Has memory for `room` images."""

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room, self.seen = room, []
        self.norm, self.head = nn.LayerNorm(3 * 4 * 4), nn.Linear(3 * 4 * 4, 5)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.seen.append(len(images))
        if len(images) > self.room:
            raise torch.OutOfMemoryError("no room")
        return self.head(self.norm(images.flatten(1)))


@pytest.fixture
def recipe(root) -> Recipe:
    return load(root / "params.yaml").recipes["digits"]


def largest(model: Small, recipe: Recipe, sizes: list[int]) -> int:
    return memory.largest_batch(model, recipe, sizes, image_size=4, num_classes=5, amp="off")


@pytest.mark.parametrize(("share", "group", "sizes"), [
    (1024, 128, [1024, 512, 256, 128]),
    (128, 128, [128]),
    (96, 16, [96, 64, 32, 16]),
    (688, 16, [688, 512, 256, 128, 64, 32, 16]),
])
def test_sizes_are_whole_groups_from_the_whole_share_down(share, group, sizes):
    assert memory.batch_sizes(share, group) == sizes
    assert all(size % group == 0 for size in sizes)


@pytest.mark.parametrize(("room", "found"), [(1000, 64), (64, 64), (63, 32), (33, 32), (16, 16)])
def test_the_largest_size_that_fits_is_found_and_nothing_smaller_tried(recipe, room, found):
    model = Small(room)
    assert largest(model, recipe, [64, 32, 16]) == found
    assert model.seen == [size for size in (64, 32, 16) if size >= found]


@pytest.mark.parametrize("optimizer", ["adamw", "lamb"])
def test_trying_changes_no_weight_and_leaves_no_gradient(recipe, optimizer):
    model = Small(32)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    largest(model, recipe.model_copy(update={"optimizer": optimizer}), [64, 32])
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_group_that_does_not_fit_is_an_error_that_says_what_to_change(recipe):
    with pytest.raises(ConfigError, match="a batch of 16 images does not fit .* smaller mixup_group"):
        largest(Small(15), recipe, [64, 32, 16])
