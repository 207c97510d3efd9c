"""The training loop: what it computes, where it stops, and that it can be left and taken up anywhere."""

from __future__ import annotations

import copy
import io
import math
from functools import partial

import pytest
import torch
import torch.multiprocessing
from torch import nn

from pipeline.base.config import load_experiment
from pipeline.base.schema import Recipe
from pipeline.loading import batching
from pipeline.training import loop

CLASSES, PER_EPOCH, BATCH = 4, 24, 8

UNEQUAL = ((0, 5), (5, BATCH))  # two workers' parts of a global batch


@pytest.fixture
def recipe() -> Recipe:
    return small_recipe()


def small_recipe(**changes) -> Recipe:
    return (
        load_experiment()
        .recipes["digits"]
        .model_copy(update={"epochs": 4, "warmup_epochs": 1, "global_batch_size": BATCH, **changes})
    )


def network(dtype=torch.float32, dropout=0.1) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Flatten(), nn.Linear(3 * 4 * 4, 16), nn.GELU(), nn.Dropout(dropout), nn.Linear(16, CLASSES)
        ).to(dtype)


def batches(epoch: int, start_step=0, bounds=(0, BATCH), at_once=BATCH, dtype=torch.float32):
    """Random images whose label is the brightest of their first four pixels: there is something to learn."""
    generator = torch.Generator().manual_seed(epoch)
    images = torch.randn(PER_EPOCH, 3, 4, 4, generator=generator, dtype=torch.float64).to(dtype)
    labels, rows = images[:, 0, 0].argmax(1), torch.arange(PER_EPOCH)
    for step in range(start_step * BATCH, PER_EPOCH, BATCH):
        for start in range(step + bounds[0], step + bounds[1], at_once):
            part = slice(start, stop := min(start + at_once, step + bounds[1]))
            yield batching.Batch(images[part], labels[part], rows[part], (step,), stop == step + bounds[1])


def start(recipe: Recipe, model: nn.Module) -> loop.TrainState:
    return loop.TrainState.create(model, recipe, steps_per_epoch=PER_EPOCH // BATCH, amp=None)


def fit(training: loop.TrainState, recipe: Recipe, on_epoch=lambda training: None, **changes) -> loop.TrainState:
    settings = {"train_batches": batches, "val_batches": lambda: batches(99), "num_classes": CLASSES, "seed": 0}
    loop.fit(training, recipe, on_epoch=on_epoch, **{**settings, **changes})
    return training


def assert_same_weights(one: nn.Module, other: nn.Module) -> None:
    for (name, weight), expected in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(weight, expected), name


@pytest.mark.parametrize("ema_decay", [None, 0.9])
@pytest.mark.parametrize("optimizer", ["adamw", "lamb"])
def test_a_training_resumed_after_any_step_ends_with_identical_weights(optimizer, ema_decay):
    recipe, saved = small_recipe(optimizer=optimizer, ema_decay=ema_decay, epochs=3), []

    def save(training: loop.TrainState) -> None:
        file = io.BytesIO()
        torch.save(training.state_dict(), file)
        saved.append((file, {name: copy.deepcopy(best.weights) for name, best in training.best.items()}))

    whole = fit(start(recipe, network()), recipe, save, on_step=save)
    assert len(saved) == recipe.epochs * (PER_EPOCH // BATCH + 1)
    assert not any(map(torch.equal, network().parameters(), whole.model.parameters()))
    for file, best_weights in saved:
        file.seek(0)
        resumed = start(recipe, network())
        resumed.load_state_dict(torch.load(file, weights_only=True), best_weights)
        fit(resumed, recipe)
        for name, model in whole.evaluated_models.items():
            assert_same_weights(resumed.evaluated_models[name], model)
            assert resumed.best[name].epoch == whole.best[name].epoch
        measured, expected = (
            [{name: value for name, value in row.items() if not name.startswith("perf/")} for row in training.history]
            for training in (resumed, whole)
        )
        assert measured == expected


def test_dropout_differs_from_epoch_to_epoch_but_not_from_run_to_run(recipe):
    first, again = (fit(start(recipe, network(dropout=0.5)), recipe) for _ in range(2))
    assert_same_weights(first.model, again.model)
    other = fit(start(recipe, network(dropout=0.5)), recipe, seed=1)
    assert not torch.equal(first.model[1].weight, other.model[1].weight)


def test_training_lowers_the_loss_and_the_best_epoch_is_the_one_of_highest_top1(recipe):
    recipe = recipe.model_copy(update={"epochs": 12, "lr": 1e-2})
    training = fit(start(recipe, network()), recipe)
    losses = [row["train/loss"] for row in training.history]
    assert losses[-1] < losses[0]
    top1 = [row["val/top1_pct"] for row in training.history]
    assert training.best["plain"].epoch == top1.index(max(top1))


def test_ema_weights_are_validated_and_kept():
    recipe, seen = small_recipe(ema_decay=0.5, lr=1e-2), []
    training = fit(
        start(recipe, network()), recipe, lambda training: seen.append(copy.deepcopy(training.evaluated_models))
    )
    for name, prefix in (("plain", "val/"), ("ema", "val/ema_")):
        found = [loop.evaluate(models[name], batches(99)).top1_pct for models in seen]
        assert [row[f"{prefix}top1_pct"] for row in training.history] == found
        best = training.best[name]
        assert best.epoch == found.index(max(found))
        assert all(map(torch.equal, best.weights.values(), seen[best.epoch][name].state_dict().values()))
    assert not any(map(torch.equal, *(models.parameters() for models in seen[-1].values())))


def test_accumulated_steps_train_as_whole_ones_do():
    recipe = small_recipe()
    whole, parts = (
        fit(
            start(recipe, network(torch.float64, dropout=0.0)),
            recipe,
            train_batches=partial(batches, at_once=at_once, dtype=torch.float64),
            val_batches=lambda: batches(99, dtype=torch.float64),
        )
        for at_once in (BATCH, 3)
    )
    for weight, expected in zip(parts.model.parameters(), whole.model.parameters(), strict=True):
        torch.testing.assert_close(weight, expected, rtol=0, atol=1e-12)
    for row, expected in zip(parts.history, whole.history, strict=True):
        assert row["train/loss"] == pytest.approx(expected["train/loss"], abs=1e-12)


def test_a_training_that_is_asked_to_stop_ends_between_two_steps_and_goes_on_from_there():
    recipe = small_recipe()
    whole, steps, asked = fit(start(recipe, network()), recipe), [], []

    def stop() -> bool:
        asked.append(True)
        return len(asked) == 5

    training = start(recipe, network())
    with pytest.raises(loop.TrainingStopped):
        fit(training, recipe, should_stop=stop, on_step=lambda training: steps.append(training.step))
    assert training.step == steps[-1] == 6  # asked at the fifth step, told at the next
    resumed = start(recipe, network())
    resumed.load_state_dict(training.state_dict(), {"plain": training.best["plain"].weights})
    fit(resumed, recipe)
    assert_same_weights(resumed.model, whole.model)


def test_a_non_finite_loss_stops_with_its_step_lr_and_image_ids(recipe):
    def poisoned(epoch: int, start_step: int):
        for number, batch in enumerate(batches(epoch)):
            images = batch.images.clone()
            if (epoch, number) == (1, 1):
                images[3] = math.nan
            yield batch._replace(images=images)

    training = start(recipe, network())
    with pytest.raises(loop.NonFiniteLossError, match=r"loss nan in epoch 1 at step 4, lr 0\.00\d+.*'8', '9', .*'15'"):
        fit(training, recipe, train_batches=poisoned, image_names=lambda rows: [str(row) for row in rows.tolist()])
    assert training.epoch == 1
    assert all(weight.isfinite().all() for weight in training.best["plain"].weights.values())


def test_evaluation_equals_a_plain_count():
    model, labels, logits = network(dropout=0.0).eval(), [], []
    with torch.no_grad():
        for batch in batches(7):
            labels.append(batch.labels)
            logits.append(model(batch.images))
    expected, scores = torch.cat(labels), torch.cat(logits)
    found = loop.evaluate(model, batches(7))
    assert found.top1_pct == pytest.approx(100 * (scores.argmax(1) == expected).float().mean().item())
    assert found.top5_pct == 100  # of four classes
    assert found.loss == pytest.approx(nn.functional.cross_entropy(scores.double(), expected).item())


def test_evaluating_nothing_is_an_error():
    with pytest.raises(ValueError, match="no images"):
        loop.evaluate(network(), [])


def test_bf16_autocast_trains(recipe):
    training = fit(start(recipe, network()), recipe, amp="bf16")
    assert math.isfinite(training.history[-1]["train/loss"])
    assert training.model[1].weight.dtype == torch.float32


def _one_of_two(rank: int, path: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{path}/rendezvous", rank=rank, world_size=2)

    def all_reduce(sums: torch.Tensor) -> torch.Tensor:
        torch.distributed.all_reduce(sums)
        return sums

    recipe, model = small_recipe(), network(torch.float64, dropout=0.0)
    training = fit(
        start(recipe, model),
        recipe,
        rank=rank,
        world_size=2,
        all_reduce=all_reduce,
        forward=nn.parallel.DistributedDataParallel(model),
        train_batches=partial(batches, bounds=UNEQUAL[rank], dtype=torch.float64),
        val_batches=lambda: batches(99, bounds=UNEQUAL[rank], dtype=torch.float64),
    )
    torch.save({"model": model.state_dict(), "history": training.history}, f"{path}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_workers_over_gloo_train_as_one_does(tmp_path):
    recipe = small_recipe()
    alone = fit(
        start(recipe, network(torch.float64, dropout=0.0)),
        recipe,
        train_batches=partial(batches, dtype=torch.float64),
        val_batches=lambda: batches(99, dtype=torch.float64),
    )
    torch.multiprocessing.spawn(_one_of_two, (str(tmp_path),), nprocs=2)
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for name, weight in alone.model.state_dict().items():
            torch.testing.assert_close(found["model"][name], weight, rtol=0, atol=1e-12)
        for row, expected in zip(found["history"], alone.history, strict=True):
            for metric in ("train/loss", "val/loss", "val/top1_pct"):
                assert row[metric] == pytest.approx(expected[metric], abs=1e-10)
