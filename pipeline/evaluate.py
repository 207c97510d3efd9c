"""The best weights of a run on the validation split: accuracy, and what the flop changes."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from safetensors.torch import load_file

from flopeq.testing import relative_error
from pipeline import data, loop, recipe, track
from pipeline.config import ConfigError, Experiment

BATCH_SIZE = 256
TIMES_CHANCE = 3  # below this multiple of guessing, a network has learned nothing


def evaluate(experiment: Experiment, run_name: str, outputs: Path = Path("outputs")) -> dict[str, float | bool]:
    """Measures a trained run, writes outputs/<run>/metrics.json, and logs the figures into its MLflow run.

    `val/flop_agreement_pct` is the share of the images that get the same top-1 class as their flop;
    `equivariance/max_rel_error` the largest relative difference between the two's logits, in float32, over the
    batches. `converged` says whether the loss stayed finite to the last epoch and top-1 left chance level behind.

    Raises: ConfigError where the run was not trained.
    """
    folder = outputs / run_name
    if not (folder / "run.json").is_file():
        raise ConfigError(f"{folder}/run.json not found: run `dvc repro train@{run_name}` first")
    status = json.loads((folder / "run.json").read_text())["status"]
    gpu = experiment.train.gpu is not False and torch.cuda.is_available()
    device = torch.device("cuda" if gpu else "cpu")
    shards = data.Shards(experiment.data.shards)
    images, run, recipe_ = data.IndexedImages(shards, "val"), experiment.run(run_name), experiment.recipe(run_name)
    model = recipe.model(run, recipe_, num_classes=len(shards.classes), seed=0).to(device).eval()
    model.load_state_dict(load_file(folder / "weights.safetensors", device=str(device)))
    loader_workers = experiment.train.loader_workers

    def batches():
        return data.val_batches(images, recipe_, experiment.data, batch_size=BATCH_SIZE,
                                loader_workers=loader_workers, device=device)

    plain = loop.evaluate(model, batches())
    agreeing, error = 0, 0.0
    with torch.inference_mode():
        for batch in batches():
            logits, of_flop = model(batch.images), model(batch.images.flip(-1))
            agreeing += int((logits.argmax(1) == of_flop.argmax(1)).sum())
            error = max(error, relative_error(of_flop, logits))
    metrics: dict[str, float | bool] = {
        "val/top1_pct": plain.top1_pct,
        "val/top5_pct": plain.top5_pct,
        "val/loss": plain.loss,
        "val/flop_agreement_pct": 100 * agreeing / len(images),
        "equivariance/max_rel_error": error,
        "converged": status == "finished" and plain.top1_pct > TIMES_CHANCE * 100 / len(shards.classes),
    }
    partial = folder / "metrics.json.partial"
    partial.write_text(json.dumps(metrics, indent=2) + "\n")
    os.replace(partial, folder / "metrics.json")
    names = ("val/flop_agreement_pct", "equivariance/max_rel_error")
    track.log_final(track.run_id(run_name, outputs), {name: metrics[name] for name in names},
                    [folder / "metrics.json"])
    return metrics
