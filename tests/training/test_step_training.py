"""Trainings of a number of steps: where they end, what they see, and that they can be left and taken up anywhere."""

from __future__ import annotations

import contextlib
import copy
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pipeline.base import config
from pipeline.base.yaml_files import dump_yaml
from pipeline.loading.batching import Batch
from pipeline.packing import pack
from pipeline.packing.sources import digits
from pipeline.training import image_losses, loop, worker
from pipeline.training.step_training import StepTraining
from tests.conftest import params_with_runs
from tests.training.test_loop import BATCH, CLASSES, PER_EPOCH, batches, network, small_recipe
from tests.training.test_worker import Context

STEPS_PER_PASS = PER_EPOCH // BATCH

ONE_EPOCH = {"epochs": 1, "warmup_epochs": 0, "cooldown_epochs": 0, "schedule_step": "step"}


def seen(training: StepTraining, start_step: int = 0) -> list[tuple[int, ...]]:
    """The pass, the step in it and the part of every batch."""

    def pass_batches(number: int, first: int):
        for step in range(first, 3):
            for part in range(2):
                yield Batch(torch.zeros(1, 3, 2, 2), torch.zeros(1), torch.tensor([number, step, part]), (), part == 1)

    return [tuple(batch.rows.tolist()) for batch in training.iterate(pass_batches, start_step, 3)]


def test_a_training_ends_in_the_middle_of_a_pass_and_resumes_at_any_step():
    training = StepTraining(steps=5, warmup_steps=0, unique_images=3)
    whole = seen(training)
    assert [batch[:2] for batch in whole[1::2]] == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]
    for step in range(6):
        assert seen(training, step) == whole[2 * step :]


def test_images_are_transposed_if_the_network_is_to_see_them_so():
    [batch] = StepTraining(1, 0, 1, transpose=True).orient(
        [Batch(images := torch.rand(2, 3, 4, 4), *[torch.zeros(2)] * 2)]
    )
    assert torch.equal(batch.images, images.transpose(2, 3)) and not torch.equal(batch.images, images)
    [batch] = StepTraining(1, 0, 1).orient([batch])
    assert torch.equal(batch.images, images.transpose(2, 3))


def train(
    training: StepTraining, start: dict | None = None, stop_after: int | None = None
) -> tuple[loop.TrainState, list]:
    """Trains with the loop, from a state if one is given. Returns the state and the learning rate of every step."""
    recipe, model, rates = small_recipe(**ONE_EPOCH), network(), []
    state = loop.TrainState.create(
        model, recipe, steps_per_epoch=training.steps, amp=None, warmup_steps=training.warmup_steps
    )
    if start is not None:
        state.load_state_dict(copy.deepcopy(start), {"plain": loop.copy_weights(model)})

    class Stopped(Exception):
        pass

    def on_step(state: loop.TrainState) -> None:
        rates.append(state.optimizer.param_groups[0]["lr"])
        if state.step == stop_after:
            raise Stopped

    with contextlib.suppress(Stopped):
        loop.fit(
            state,
            recipe,
            train_batches=lambda _, start_step: training.iterate(batches, start_step, STEPS_PER_PASS),
            val_batches=lambda: batches(99),
            on_epoch=lambda state: None,
            on_step=on_step,
            num_classes=CLASSES,
            seed=0,
        )
    return state, rates


def test_a_resumed_training_ends_with_the_weights_of_an_uninterrupted_one():
    training = StepTraining(steps=STEPS_PER_PASS * 2 + 1, warmup_steps=2, unique_images=PER_EPOCH)
    whole, _ = train(training)
    partial, _ = train(training, stop_after=STEPS_PER_PASS + 1)
    resumed, _ = train(training, copy.deepcopy(partial.state_dict()))
    assert whole.step == resumed.step == training.steps
    for name, weight in whole.model.state_dict().items():
        assert torch.equal(weight, resumed.model.state_dict()[name]), name
    assert [row["epoch"] for row in whole.history] == [0]  # validated once, at the end
    assert resumed.history[0]["val/loss"] == whole.history[0]["val/loss"]


def test_the_schedule_spans_the_steps():
    recipe = small_recipe()
    _, rates = train(StepTraining(steps=20, warmup_steps=5, unique_images=PER_EPOCH))
    assert len(rates) == 20
    line = [recipe.warmup_lr + (recipe.lr - recipe.warmup_lr) * step / 5 for step in range(5)]
    cosine = [
        recipe.min_lr + (recipe.lr - recipe.min_lr) * (1 + math.cos(math.pi * step / 20)) / 2 for step in range(5, 20)
    ]
    assert rates == pytest.approx(line + cosine)


class FirstColumn(nn.Module):
    """Logits that are the first pixels of an image's first row."""

    def forward(self, images: Tensor) -> Tensor:
        return images[:, 0, 0]


def test_losses_of_images_and_of_the_mean_of_both_predictions():
    images, labels = torch.randn(5, 3, 3, 3), torch.tensor([0, 1, 2, 0, 1])
    parts = [Batch(images[:3], labels[:3], labels[:3]), Batch(images[3:], labels[3:], labels[3:])]
    found = image_losses.measure_image_losses(FirstColumn(), parts, average_over_flop=True)
    probs = images[:, 0, 0].double().softmax(1)
    averaged = (probs + probs.flip(1)) / 2
    rows = torch.arange(5)
    np.testing.assert_allclose(found.losses, -probs[rows, labels].log())
    np.testing.assert_allclose(found.averaged_losses, -averaged[rows, labels].log())
    assert found.hits.tolist() == (probs.argmax(1) == labels).tolist()
    assert found.averaged_hits is not None and found.averaged_hits.tolist() == (averaged.argmax(1) == labels).tolist()
    halves = [image_losses.measure_image_losses(FirstColumn(), [part], average_over_flop=True) for part in parts]
    nothing = image_losses.measure_image_losses(FirstColumn(), [], average_over_flop=True)
    np.testing.assert_array_equal(image_losses.concatenate([*halves, nothing]).averaged_losses, found.averaged_losses)
    assert image_losses.measure_image_losses(FirstColumn(), parts, average_over_flop=False).averaged_losses is None


@pytest.fixture
def experiment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> config.Experiment:
    """The digits with a tiny network, and their shards."""
    monkeypatch.chdir(tmp_path)
    params = params_with_runs("e-vit")
    params["models"]["e-vit"]["args"] |= {"embed_dim": 8, "depth": 1}
    params["recipes"]["digits"] |= ONE_EPOCH
    params["train"] |= {"checkpoint_steps": 2}
    Path("params.yaml").write_text(dump_yaml(params))
    experiment = config.load_experiment()
    digits.write_digits(Path(experiment.data.source))
    pack.pack_source(experiment.data.source, experiment.data.shards, images_per_shard=512, seed=0)
    return experiment


def test_a_killed_worker_resumes_to_the_same_losses_on_a_subset(experiment, monkeypatch):
    def run(checkpoints: str, **changes) -> dict:
        training = StepTraining(**{"steps": 5, "warmup_steps": 1, "unique_images": 150, **changes})
        task = worker.WorkerTask(experiment, "e-vit", ".", checkpoints, "stop", step_training=training)
        return worker.train_loop_per_worker(task, Context())

    reference = run("reference")
    assert [len(reference["history"]), reference["image_losses"].losses.shape] == [1, (360,)]
    assert reference["image_losses"].losses.mean() == pytest.approx(reference["history"][0]["val/loss"])
    save = worker.CheckpointManager.save

    def save_and_die(manager, step, *state):
        save(manager, step, *state)
        manager.wait()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(worker.CheckpointManager, "save", save_and_die)
        run("killed")
    resumed = run("killed")
    np.testing.assert_array_equal(resumed["image_losses"].losses, reference["image_losses"].losses)
    assert not np.array_equal(run("more", unique_images=300)["image_losses"].losses, reference["image_losses"].losses)
    transposed = run("transposed", transpose=True)
    assert not np.array_equal(transposed["image_losses"].losses, reference["image_losses"].losses)
