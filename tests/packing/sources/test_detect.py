"""Detection: existing shards, archives, folders, and what is none of them."""

from __future__ import annotations

import shutil

import pytest

from pipeline.base.errors import SourceError
from pipeline.packing.sources import detect
from pipeline.packing.sources.detect import ExistingShards
from tests.packing import layouts


def test_existing_shards_are_distinguished_from_archives(images, tmp_path):
    shards = detect.detect_source(str(layouts.shards(images, tmp_path / "shards")))
    assert shards == ExistingShards(str(tmp_path / "shards"))
    assert ("imagenet1k-validation-0000.tar" in dict(shards.list_files())) and shards.layout == "WebDataset shards"
    assert detect.detect_source(str(layouts.archives(images, tmp_path / "archives"))).layout == "the official archives"
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "manifest.json").write_text("{}")
    assert detect.detect_source(str(tmp_path / "ours")) == ExistingShards(str(tmp_path / "ours"))
    assert detect.detect_source("s3://bucket/imagenet") == ExistingShards("s3://bucket/imagenet")


def test_an_unsupported_source_is_reported_with_all_layouts(tree, images, tmp_path):
    with pytest.raises(SourceError, match="missing data folder: .*nowhere not found. Set data.source .* to one of: "):
        detect.detect_source(str(tmp_path / "nowhere"))
    with pytest.raises(SourceError, match="contains nothing, which is not a supported layout. Set data.source"):
        detect.detect_source(str(tmp_path))
    with pytest.raises(SourceError, match=rf"which is not a supported layout, but {tree} is a folder tree. Set"):
        detect.detect_source(str(tree / "train"))
    shutil.copytree(tree, tmp_path / "deeper" / "imagenette2")
    with pytest.raises(SourceError, match="contains imagenette2, .*, but .*deeper/imagenette2 is a folder tree"):
        detect.detect_source(str(tmp_path / "deeper"))
    kaggle = layouts.kaggle_folder(images, tmp_path / "kaggle")
    with pytest.raises(SourceError, match=f"contains Annotations, Data, .*, but {kaggle} is Kaggle's folder"):
        detect.detect_source(str(kaggle / "ILSVRC"))
    (tmp_path / "imagenette2.tgz").touch()
    with pytest.raises(SourceError, match="imagenette2.tgz is a file of an unsupported kind: extract it"):
        detect.detect_source(str(tmp_path / "imagenette2.tgz"))
    (tmp_path / layouts.TRAIN_TAR).touch()
    with pytest.raises(SourceError, match=f"one of ImageNet's archives: set data.source to its folder, {tmp_path}"):
        detect.detect_source(str(tmp_path / layouts.TRAIN_TAR))
