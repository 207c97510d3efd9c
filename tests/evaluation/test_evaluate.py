"""What evaluation says of weights is what counting one image after the other gives, on every set it is asked for."""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from torchvision.transforms.v2.functional import pil_to_tensor

from flopeq.hub.convert import convert_checkpoint
from pipeline import track
from pipeline.base import config, errors, imagenet, schema
from pipeline.base.errors import SourceError
from pipeline.evaluation import evaluate, validation_sets
from pipeline.evaluation.weights import WeightsError
from pipeline.loading import augment, batching, datasets
from pipeline.packing import pack
from pipeline.packing.sources import detect
from pipeline.shards import manifests
from pipeline.training import recipe
from stages import check, evaluate_weights, run_stage
from tests.conftest import params_with_runs
from tests.hub.test_convert import NETWORKS, authors_weights, ours
from tests.models.conftest import randomize_parameters
from tests.packing import layouts

ROOT = Path(__file__).resolve().parents[2]

WNIDS = ("n01440764", "n01443537", "n02102040", "n03417042", "n07753592")

SIDE = 48

PUBLISHED = NETWORKS["E(ViT), fused"]

PUBLISHED_ARGS = {"patch_size": 8, "embed_dim": 24, "num_heads": 2, "depth": 2}
"""What the weights of that network do not show."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fifteen validation images of five of ImageNet's classes, sharded with labels of their own and with ImageNet's."""
    folder = tmp_path_factory.mktemp("evaluate")
    layouts.folder_tree(layouts.images(train=2, val=3, wnids=WNIDS), folder / "source")
    source = detect.detect_source(str(folder / "source"))
    assert not isinstance(source, detect.ExistingShards)
    for labels in ("own", "imagenet"):
        pack.pack_listing(
            source.list_images(labels),
            source.root,
            folder / "data/shards" / labels,
            source="source",
            images_per_shard=4,
            seed=0,
            labels=labels,
        )
    return folder


@pytest.fixture
def place(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with those shards and an empty `outputs`."""
    (tmp_path / "data").symlink_to(base / "data")
    (tmp_path / "source").symlink_to(base / "source")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluate, "BATCH_SIZE", 4)  # the last of four batches is not full
    return tmp_path


def experiment(
    labels: str = "own", *, ema: bool = False, loader_workers: int = 0, **data_changes: Any
) -> config.Experiment:
    """Two small ViTs on those shards, from a params.yaml that is written here."""
    params = params_with_runs("vit", "e-vit")
    params["data"] |= {"name": labels, "source": "source", "labels": labels, "image_size": SIDE, **data_changes}
    params["train"]["loader_workers"] = loader_workers
    for run in params["models"].values():
        run["args"] = {**run["args"], "img_size": SIDE}
    params["recipes"]["digits"] |= {
        "test_crop_ratio": 0.875,
        "ema_decay": 0.9 if ema else None,
        "drop_path": 0.5,  # which evaluation must not do
    }
    Path("params.yaml").write_text(yaml.safe_dump(params))
    return config.load_experiment()


@torch.no_grad()
def network(experiment: config.Experiment, run_name: str, seed: int) -> nn.Module:
    """Random weights, of which a bias keeps any class from being the validation images' only one."""
    run, shards = experiment.run(run_name), manifests.Shards(experiment.data.shards)
    recipe_ = experiment.recipe(run_name)
    model = randomize_parameters(recipe.build_model(run, recipe_, num_classes=len(shards.classes), seed=0)).eval()
    head: Any = model.head
    head.weight.copy_(torch.randn(head.weight.shape, generator=torch.Generator().manual_seed(seed)))
    [batch] = batching.val_batches(datasets.IndexedImages(shards, "val"), recipe_, experiment.data, batch_size=100)
    head.bias -= model(batch.images).mean(0)
    return model


@torch.no_grad()
def constant(experiment: config.Experiment, class_: int) -> nn.Module:
    """A ViT for which everything is of one class, and otherwise the likelier the smaller the label."""
    model = network(experiment, "vit", seed=0)
    head: Any = model.head
    head.weight.zero_()
    head.bias.copy_(torch.linspace(0, -1, len(head.bias)))
    head.bias[class_] = 1
    return model


def keep(run_name: str, status: str = "finished", **models: nn.Module) -> None:
    """Leaves what a training leaves, with weights by file name."""
    folder = Path("outputs", run_name)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.json").write_text(json.dumps({"status": status, "mlflow_run_id": "0" * 32}))
    for name, model in models.items():
        save_file(model.state_dict(), folder / f"{name}.safetensors")


@pytest.fixture
def logged(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """What goes to MLflow."""
    metrics: dict[str, float] = {}
    monkeypatch.setattr(track, "log_results", lambda run_id, found, artifacts: metrics.update(found))
    return metrics


@torch.no_grad()
def one_by_one(
    model: nn.Module, settings: config.Experiment, folder: Path, label_of: Callable[[str], int]
) -> dict[str, float]:
    """The accuracies on a folder `<class>/*`, by PIL and one image at a time."""
    transform = augment.build_eval_transform(settings.recipe("vit"), settings.data)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (settings.data.mean, settings.data.std))
    ranks, losses = [], []
    paths = [path for path in sorted(folder.glob("*/*")) if path.suffix != ".txt"]
    for path in paths:
        pixels = transform(pil_to_tensor(Image.open(path).convert("RGB")))
        logits = model(((pixels / 255 - mean) / std)[None])[0]
        label = label_of(path.parent.name)
        ranks.append(int((logits > logits[label]).sum()))
        losses.append(float(logits.double().logsumexp(0) - logits[label]))
    share = {f"top{k}_pct": 100 * sum(rank < k for rank in ranks) / len(ranks) for k in (1, 5)}
    assert len(paths) > 0 and 0 < share["top1_pct"] < 100, "the comparison is to show something"
    return share | {"loss": sum(losses) / len(losses)}


def assert_same(metrics: dict[str, Any], expected: dict[str, float], prefix: str) -> None:
    for name, value in expected.items():
        if prefix + name in metrics:
            assert metrics[prefix + name] == pytest.approx(value, rel=1e-4), name


@pytest.mark.parametrize("loader_workers", [0, 2])
def test_every_validation_image_counts_once(place: Path, logged: dict[str, float], loader_workers: int) -> None:
    settings = experiment(loader_workers=loader_workers)
    model = network(settings, "vit", seed=1)
    keep("vit", weights=model)
    metrics = evaluate.evaluate_run(settings, "vit")
    expected = one_by_one(model, settings, Path("source/val"), WNIDS.index)
    assert {"val/top1_pct", "val/top5_pct", "val/loss"} <= metrics.keys()
    assert_same(metrics, expected, "val/")
    assert metrics == json.loads(Path("outputs/vit/metrics.json").read_text())
    assert metrics.keys() == {"val/top1_pct", "val/top5_pct", "val/loss", "val/flop_agreement_pct",
                              "equivariance/max_rel_error", "converged"}  # fmt: skip
    assert logged.keys() == {"val/flop_agreement_pct", "equivariance/max_rel_error"}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.usefixtures("logged")
def test_a_gpu_gives_the_figures_of_the_cpu(place: Path) -> None:
    settings, found = experiment(ema=True, further_val={"again": "source/val"}), []
    keep("vit", weights=network(settings, "vit", seed=1), weights_ema=network(settings, "vit", seed=2))
    for gpu in (False, True):
        train = settings.train.model_copy(update={"gpu": gpu, "loader_workers": 2 * gpu})
        found.append(evaluate.evaluate_run(settings.model_copy(update={"train": train}), "vit"))
    one_image = 100 / 15  # rounding may decide one
    assert found[1] == pytest.approx(found[0], rel=1e-2, abs=one_image + 0.1)
    assert found[1]["val/loss"] == pytest.approx(found[0]["val/loss"], rel=1e-2)


def test_averaged_weights_are_measured_beside_the_plain_ones(place: Path, logged: dict[str, float]) -> None:
    settings = experiment(ema=True)
    plain, averaged = network(settings, "vit", seed=1), network(settings, "vit", seed=2)
    keep("vit", weights=plain, weights_ema=averaged)
    metrics = evaluate.evaluate_run(settings, "vit")
    found = {}
    for prefix, model in (("val/", plain), ("val/ema_", averaged)):
        found[prefix] = one_by_one(model, settings, Path("source/val"), WNIDS.index)
        assert f"{prefix}top1_pct" in metrics and f"{prefix}top5_pct" in metrics
        assert_same(metrics, found[prefix], prefix)
    assert found["val/"]["top1_pct"] != found["val/ema_"]["top1_pct"]
    assert logged.keys() == {"val/flop_agreement_pct", "equivariance/max_rel_error"}, "training logs the others"
    assert "val/ema_top1_pct" not in evaluate.evaluate_run(experiment(), "vit"), (
        "left from a recipe that had an average"
    )


def test_missing_weights_are_named(place: Path) -> None:
    with pytest.raises(errors.ConfigError, match=r"run `dvc repro train@vit` first"):
        evaluate.evaluate_run(experiment(), "vit")
    settings = experiment(ema=True)
    keep("vit", weights=network(settings, "vit", seed=1))
    with pytest.raises(errors.ConfigError, match="weights_ema.safetensors not found"):
        evaluate.evaluate_run(settings, "vit")


@pytest.mark.usefixtures("logged")
def test_the_flop_changes_an_ordinary_network_and_no_equivariant_one(place: Path) -> None:
    settings, found = experiment(), {}
    for name in ("vit", "e-vit"):
        keep(name, weights=network(settings, name, seed=1))
        found[name] = evaluate.evaluate_run(settings, name)
    assert found["e-vit"]["val/flop_agreement_pct"] == 100
    assert found["e-vit"]["equivariance/max_rel_error"] < 1e-4
    assert found["vit"]["val/flop_agreement_pct"] < 100
    assert found["vit"]["equivariance/max_rel_error"] > 1e-2


def test_an_error_that_is_not_finite_is_not_lost(place: Path) -> None:
    class Overflowing(nn.Module):
        """Gives infinite logits of the second batch, and of its flop."""

        calls = 0

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            return torch.ones(len(images), 5) * (math.inf if self.calls in (3, 4) else 1)

    settings = experiment()
    shards = manifests.Shards(settings.data.shards)
    metrics = evaluate.evaluate_model(settings, settings.recipe("vit"), shards, Overflowing())
    assert math.isnan(metrics["equivariance/max_rel_error"])


@pytest.mark.usefixtures("logged")
def test_converged_is_a_training_that_ended_above_chance(place: Path) -> None:
    settings = experiment("imagenet")
    label = imagenet.wnids().index(WNIDS[2])
    for status, class_, converged in (("finished", label, True), ("diverged", label, False), ("finished", 3, False)):
        keep("vit", status, weights=constant(settings, class_))
        assert evaluate.evaluate_run(settings, "vit")["converged"] is converged


# ReaL


def timm_labels() -> list[list[int]]:
    """The labels of ImageNet's validation images in their order, as they lie in timm."""
    return json.loads((resources.files("timm.data") / "_info/imagenet_real_labels.json").read_text())


def test_real_counts_a_class_that_is_one_of_an_images_labels(place: Path, logged: dict[str, float]) -> None:
    settings, known = experiment("imagenet"), timm_labels()[:15]
    counted = [labels for labels in known if labels]
    assert len(counted) < len(known), "an image without labels is among them"
    several = next(labels for labels in counted if len(labels) > 1)
    for class_ in several:
        keep("vit", weights=constant(settings, class_))
        share = 100 * sum(class_ in labels for labels in counted) / len(counted)
        assert evaluate.evaluate_run(settings, "vit")["val/real_top1_pct"] == pytest.approx(share)
        assert share > 0 and logged["val/real_top1_pct"] == pytest.approx(share)


def test_real_is_for_imagenets_classes_and_validation_images_only() -> None:
    classes, keys = imagenet.wnids(), ["val/n01751748/ILSVRC2012_val_00000001", "ILSVRC2012_val_00000002"]
    assert validation_sets.real_labels(classes, keys) == [[], [970, 795]]
    assert validation_sets.real_labels(classes, ["x/ILSVRC2012_val_00050000_n01440764"]) == [timm_labels()[-1]]
    assert validation_sets.real_labels(classes[::-1], keys) is None
    assert validation_sets.real_labels(classes[:5], keys) is None
    assert validation_sets.real_labels(classes, [*keys, "n01440764_18"]) is None
    assert validation_sets.real_labels(classes, [*keys, "ILSVRC2012_val_00050001"]) is None
    assert validation_sets.real_labels(classes, keys[:1]) is None, "nothing to count"


def test_real_leaves_out_images_that_no_label_holds_for() -> None:
    assert validation_sets.real_top1_pct([5, 7, 7, 1], [[], [7], [6, 8], [0, 1]]) == pytest.approx(100 * 2 / 3)


# Further validation sets


@pytest.fixture
def v2(place: Path) -> Path:
    """A set of odd images in folders named by ImageNet's labels, which sort as 10 < 2."""
    kinds = iter((*layouts.ISSUES, "rotated", "png"))
    for class_ in (2, 10, 0):
        for number in range(2):
            path = place / "v2" / str(class_) / f"{number}.jpeg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(layouts.issue_image(next(kinds)))
        (place / "v2" / str(class_) / "license.txt").write_text("no image")
    return place / "v2"


def test_a_set_in_folders_named_by_imagenets_labels(v2: Path, logged: dict[str, float]) -> None:
    settings = experiment("imagenet", further_val={"v2": str(v2), "again": "source/val"})
    model = constant(settings, 10)
    keep("vit", weights=model)
    metrics = evaluate.evaluate_run(settings, "vit")
    assert metrics["v2/top1_pct"] == pytest.approx(100 / 3) == logged["v2/top1_pct"]
    assert_same(metrics, one_by_one(model, settings, v2, int), "v2/")
    for kind in ("top1_pct", "top5_pct"):
        assert metrics[f"again/{kind}"] == metrics[f"val/{kind}"] == logged[f"again/{kind}"]


@pytest.mark.usefixtures("logged")
def test_a_set_in_folders_named_by_class(place: Path) -> None:
    for number, class_ in enumerate(WNIDS[1:4]):
        folder = place / "more" / class_
        folder.mkdir(parents=True)
        for seed in range(6 + number):
            (folder / f"{seed}.JPG").write_bytes(layouts.jpeg(100 * number + seed))
    settings = experiment(further_val={"more": "more"})
    model = network(settings, "vit", seed=1)
    keep("vit", weights=model)
    expected = one_by_one(model, settings, place / "more", WNIDS.index)
    metrics = evaluate.evaluate_run(settings, "vit")
    assert metrics["more/top1_pct"] == pytest.approx(expected["top1_pct"])
    assert metrics["more/top5_pct"] == pytest.approx(expected["top5_pct"]) == 100


def test_numbers_are_labels_of_imagenets_classes_only(v2: Path) -> None:
    images = validation_sets.load_further_set("v2", v2, imagenet.wnids())
    assert images.labels.tolist() == [0, 0, 10, 10, 2, 2]
    with pytest.raises(SourceError, match="named by the data's classes; 3 of 3 are not: 0, 10, 2"):
        validation_sets.load_further_set("v2", v2, WNIDS)
    classes = [str(number) for number in range(9, 12)] + ["0", "2"]
    assert validation_sets.load_further_set("v2", v2, classes).labels.tolist() == [3, 3, 1, 1, 4, 4]


def no_folder(folder: Path) -> None:
    shutil.rmtree(folder)


def a_tar(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_bytes(b"tar")


def no_images(folder: Path) -> None:
    for path in folder.glob("*/*.jpeg"):
        path.unlink()


def an_unknown_class(folder: Path) -> None:
    (folder / "1000").mkdir()
    (folder / "1000/0.jpeg").write_bytes(layouts.jpeg(0))


def classes_of_two_kinds(folder: Path) -> None:
    (folder / "10").rename(folder / "n0144O764")


@pytest.mark.parametrize(("harm", "message"), [
    (no_folder, "v2 not found; images must lie in .*v2/<class>/"),
    (a_tar, "v2 is a file: unpack it"),
    (no_images, "v2 holds no images"),
    (an_unknown_class, "by ImageNet's labels, 0 to 999; 1 of 4 are not: 1000; did you mean '100'"),
    (classes_of_two_kinds, "3 of 3 are not: 0, 2, n0144O764"),
])  # fmt: skip
def test_a_set_that_cannot_be_measured_is_refused_before_anything_starts(
    v2: Path, harm: Callable[[Path], None], message: str
) -> None:
    experiment("imagenet", further_val={"v2": str(v2)})
    check.run()
    harm(v2)
    with pytest.raises(SourceError, match=message) as caught:
        check.run()
    assert str(caught.value).startswith("data.further_val.v2: ")


@pytest.mark.parametrize("name", ["val", "train", "perf"])
def test_a_name_that_other_metrics_have_is_refused(v2: Path, name: str) -> None:
    experiment("imagenet", further_val={name: str(v2)})
    with pytest.raises(SourceError, match="rename the set"):
        check.run()


def test_a_name_that_mlflow_would_refuse_is_refused(place: Path) -> None:
    with pytest.raises(errors.ConfigError, match="data.further_val.ImageNet V2"):
        experiment("imagenet", further_val={"ImageNet V2": "v2"})


@pytest.mark.parametrize(("kind", "loader_workers"), [*((kind, 0) for kind in layouts.BAD_IMAGES), ("truncated", 2)])
def test_an_unreadable_image_is_named(v2: Path, kind: str, loader_workers: int) -> None:
    bad = v2 / "10" / "1.jpeg"
    bad.write_bytes(layouts.issue_image(kind))
    settings = experiment("imagenet", further_val={"v2": str(v2)}, loader_workers=loader_workers)
    keep("vit", weights=constant(settings, 10))
    with pytest.raises(SourceError, match="^[^\n]*v2/10/1.jpeg cannot be read [^\n]*: replace or remove it$"):
        evaluate.evaluate_run(settings, "vit")
    assert not Path("outputs/vit/metrics.json").exists()


# Weights in a file


@pytest.fixture
def published(place: Path) -> Path:
    """A checkpoint as the authors publish it."""
    wrapped = {f"_orig_mod.{name}": tensor for name, tensor in authors_weights(PUBLISHED).items()}
    args = argparse.Namespace(model="inv_deit_base_patch16_LS", drop_path=0.1)
    torch.save({"model": wrapped, "epoch": 399, "args": args}, place / "published.pth")
    return place / "published.pth"


def words(args: dict[str, Any]) -> list[str]:
    return [f"{name}={value}" for name, value in args.items()]


def stage(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "stages.evaluate_weights", *words],
        text=True,
        capture_output=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        timeout=300,
    )


def test_the_authors_file_is_measured_by_one_command(published: Path) -> None:
    settings = experiment(further_val={"again": "source/val"})
    done = stage(str(published), PUBLISHED["model"], *words(PUBLISHED_ARGS))
    assert done.returncode == 0, done.stderr
    metrics = json.loads(done.stdout)
    expected = one_by_one(ours(PUBLISHED).float(), settings, Path("source/val"), WNIDS.index)
    assert metrics["val/top1_pct"] == pytest.approx(expected["top1_pct"]) == metrics["again/top1_pct"]
    assert_same(metrics, expected, "val/")
    assert metrics["val/flop_agreement_pct"] == 100 and metrics["equivariance/max_rel_error"] < 1e-4
    assert not Path("outputs").exists()


def test_weights_of_ours_are_measured_as_their_run_is(place: Path, logged: dict[str, float]) -> None:
    settings = experiment()
    keep("e-vit", weights=network(settings, "e-vit", seed=1))
    of_run = evaluate.evaluate_run(settings, "e-vit")
    args = {name: value for name, value in settings.run("e-vit").args.items() if name != "img_size"}
    path = Path("outputs/e-vit/weights.safetensors")
    of_file = evaluate.evaluate_weights(settings, path, settings.run("e-vit").model, args)
    assert of_run == {**of_file, "converged": of_run["converged"]}


def test_a_published_file_and_its_conversion_are_the_same(published: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings, model = experiment(), PUBLISHED["model"]
    monkeypatch.setattr("flopeq.hub.convert.build", lambda name, device, **args: nn.Identity())
    monkeypatch.setattr(nn.Identity, "load_state_dict", lambda *args, **kwargs: None)
    convert_checkpoint(published, model, Path("ours.safetensors"))
    found = [evaluate.evaluate_weights(settings, path, model, PUBLISHED_ARGS)
             for path in (published, Path("ours.safetensors"))]  # fmt: skip
    assert found[0] == found[1]
    with pytest.raises(WeightsError, match="holds the weights of a flop_deit3_base_patch16_224, not of a "):
        evaluate.evaluate_weights(settings, Path("ours.safetensors"), "deit3_base_patch16_224", {})


@pytest.mark.parametrize(("changes", "model", "args", "message"), [
    ({"name": "imagenet", "labels": "imagenet"}, None, {}, "has 5 classes, but the data .* has 1000"),
    ({"image_size": 32}, None, {}, "for images of 48 x 48 pixels, but data.image_size is 32"),
    ({}, None, {"embed_dim": 32}, "does not fit flop_deit3_base_patch16_224 .*embed_dim=32.*: size mismatch for"),
    ({}, None, {"num_classes": 5}, "num_classes comes from the data"),
    ({}, "flop_resmlp_24_224", {}, "use a name such as flop_deit3_small_patch16_224"),
    ({}, "resnet18", {}, "'resnet18' is not a model of the study"),
])  # fmt: skip
def test_weights_that_do_not_fit_are_refused(
    published: Path, changes: dict[str, Any], model: str | None, args: dict[str, Any], message: str
) -> None:
    settings = experiment()
    settings = settings.model_copy(update={"data": settings.data.model_copy(update=changes)})
    with pytest.raises(WeightsError, match=message):
        evaluate.evaluate_weights(settings, published, model or PUBLISHED["model"], PUBLISHED_ARGS | args)


def test_a_file_that_holds_no_weights_is_refused(place: Path) -> None:
    settings, model = experiment(), PUBLISHED["model"]
    for name in ("no.pth", "no.safetensors"):
        with pytest.raises(WeightsError, match=name):
            evaluate.evaluate_weights(settings, place / name, model, {})
        (place / name).write_bytes(b"hello")
        with pytest.raises(WeightsError, match=name):
            evaluate.evaluate_weights(settings, place / name, model, {})
    save_file({"fc.weight": torch.ones(5, 3)}, place / "other.safetensors")
    with pytest.raises(WeightsError, match="lacks 'head.weight': it does not hold the weights of a flop_deit3_base"):
        evaluate.evaluate_weights(settings, place / "other.safetensors", model, {})


def test_the_test_crop_is_that_of_the_models_runs(published: Path) -> None:
    settings, model = experiment(), PUBLISHED["model"]
    other = settings.recipes["digits"].model_copy(update={"test_crop_ratio": 1.0})
    settings = settings.model_copy(update={"recipes": {**settings.recipes, "other": other}})
    with pytest.raises(errors.ConfigError, match="test_crop_ratio 0.875 and 1.0, and the one for"):
        evaluate.evaluate_weights(settings, published, model, PUBLISHED_ARGS)
    found = []
    for recipe_name in ("digits", "other"):
        runs = {**settings.models, "published": schema.Run(model=model, recipe=recipe_name)}
        chosen = settings.model_copy(update={"models": runs})
        found.append(evaluate.evaluate_weights(chosen, published, model, PUBLISHED_ARGS)["val/loss"])
    assert found[0] != found[1]


@pytest.mark.parametrize(("given", "message"), [
    (["published.pth"], "usage: python -m stages.evaluate_weights FILE MODEL"),
    (["published.pth", PUBLISHED["model"], "depht=2"], "did you mean 'depth'?"),
    (["missing.pth", PUBLISHED["model"]], "missing.pth"),
])  # fmt: skip
@pytest.mark.usefixtures("published")
def test_mistakes_on_the_command_line_are_told_without_a_traceback(
    given: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    experiment()
    monkeypatch.setattr(sys, "argv", ["evaluate_weights", *given])
    with pytest.raises(SystemExit) as left:
        run_stage(evaluate_weights.run)
    printed = capsys.readouterr()
    assert left.value.code == 2 and not printed.out
    assert printed.err.startswith("error: ") and message in printed.err
