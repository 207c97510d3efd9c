"""ReaL labels and further validation sets."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from importlib import resources
from pathlib import Path

import pytest

from pipeline.base import errors, imagenet
from pipeline.base.errors import SourceError
from pipeline.evaluation import evaluate, validation_sets
from stages import check
from tests.evaluation.conftest import (
    WNIDS,
    assert_same,
    constant_network,
    evaluate_one_by_one,
    experiment,
    random_network,
    save_outputs,
)
from tests.packing import layouts


def timm_labels() -> list[list[int]]:
    """The labels of ImageNet's validation images in their order, as they lie in timm."""
    return json.loads((resources.files("timm.data") / "_info/imagenet_real_labels.json").read_text())


def test_real_counts_a_class_that_is_one_of_an_images_labels(place: Path, logged: dict[str, float]) -> None:
    settings, known = experiment("imagenet"), timm_labels()[:15]
    counted = [labels for labels in known if labels]
    assert len(counted) < len(known), "an image without labels is among them"
    several = next(labels for labels in counted if len(labels) > 1)
    for class_ in several:
        save_outputs("vit", weights=constant_network(settings, class_))
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
    model = constant_network(settings, 10)
    save_outputs("vit", weights=model)
    metrics = evaluate.evaluate_run(settings, "vit")
    assert metrics["v2/top1_pct"] == pytest.approx(100 / 3) == logged["v2/top1_pct"]
    assert_same(metrics, evaluate_one_by_one(model, settings, v2, int), "v2/")
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
    model = random_network(settings, "vit", seed=1)
    save_outputs("vit", weights=model)
    expected = evaluate_one_by_one(model, settings, place / "more", WNIDS.index)
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


def remove_folder(folder: Path) -> None:
    shutil.rmtree(folder)


def replace_by_tar(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_bytes(b"tar")


def remove_images(folder: Path) -> None:
    for path in folder.glob("*/*.jpeg"):
        path.unlink()


def add_unknown_class(folder: Path) -> None:
    (folder / "1000").mkdir()
    (folder / "1000/0.jpeg").write_bytes(layouts.jpeg(0))


def mix_class_names(folder: Path) -> None:
    (folder / "10").rename(folder / "n0144O764")


@pytest.mark.parametrize(("harm", "message"), [
    (remove_folder, "v2 not found; images must lie in .*v2/<class>/"),
    (replace_by_tar, "v2 is a file: unpack it"),
    (remove_images, "v2 holds no images"),
    (add_unknown_class, "by ImageNet's labels, 0 to 999; 1 of 4 are not: 1000; did you mean '100'"),
    (mix_class_names, "3 of 3 are not: 0, 2, n0144O764"),
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
    save_outputs("vit", weights=constant_network(settings, 10))
    with pytest.raises(SourceError, match="^[^\n]*v2/10/1.jpeg cannot be read [^\n]*: replace or remove it$"):
        evaluate.evaluate_run(settings, "vit")
    assert not Path("outputs/vit/metrics.json").exists()


def test_a_further_set_has_the_images_that_shards_would_have(v2: Path) -> None:
    before = validation_sets.load_further_set("v2", v2, imagenet.wnids())
    for name in ("a.jfif", "b.avif", "c.JPE"):
        (v2 / "2" / name).write_bytes(layouts.jpeg(0))
    (v2 / "2" / "d.pgm").write_bytes(b"P5 1 2 65535 " + bytes([0, 0, 128, 128]))
    for folder in (v2, v2 / "2"):
        for name in (".ipynb_checkpoints", "__MACOSX"):
            (folder / name).mkdir()
            (folder / name / "1-checkpoint.jpeg").write_bytes(b"")
        (folder / "._1.jpeg").write_bytes(b"\0\5\x16\7 AppleDouble")
    after = validation_sets.load_further_set("v2", v2, imagenet.wnids())
    added = sorted({*after.paths} - {*before.paths})
    assert [path.name for path in added] == ["a.jfif", "b.avif", "c.JPE", "d.pgm"]
    row = after.paths.index(added[-1])
    assert after.decode(row, *after.read_jpegs([row]))[0].flatten().tolist() == [0, 128]
