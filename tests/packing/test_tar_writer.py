"""Tars are those of the standard library, byte for byte."""

from __future__ import annotations

import io
import tarfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.packing import tar_writer
from pipeline.packing.tar_writer import TarWriter


@given(sizes=st.lists(st.integers(0, 5000) | st.sampled_from([512, 1024, 3000, 9000]), max_size=40))
@settings(deadline=None)
def test_tars_are_tarfiles_own_bytes_whatever_the_sizes(tmp_path_factory, sizes):
    rng = np.random.default_rng(len(sizes))
    files = {f"train/n01440764/{number}.jpg": rng.bytes(size) for number, size in enumerate(sizes)}
    expected = io.BytesIO()
    with tarfile.open(fileobj=expected, mode="w", format=tarfile.USTAR_FORMAT) as twin:
        for name, content in files.items():
            header = tarfile.TarInfo(name)
            header.size = len(content)
            twin.addfile(header, io.BytesIO(content))
    path = tmp_path_factory.mktemp("tar") / "a.tar"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tar_writer, "_BUFFER_BYTES", 4096)  # so that some files are larger, and many buffers are used
        with TarWriter(path) as tar:
            offsets = [tar.add(name, content) for name, content in files.items()]
            tar.finish()
    assert path.read_bytes() == expected.getvalue()
    assert tar.size == len(expected.getvalue()) == tar_writer.tar_size(np.array(sizes, np.int64))
    for offset, content in zip(offsets, files.values(), strict=True):
        assert expected.getvalue()[offset : offset + len(content)] == content
