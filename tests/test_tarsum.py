"""The quick sum of a tar's header is the standard library's."""

from __future__ import annotations

import tarfile

from hypothesis import given
from hypothesis import strategies as st

from pipeline.tarsum import header_sums, quick_headers

SLOWLY = tarfile.calc_chksums


@given(st.binary(min_size=512, max_size=512) | st.lists(st.integers(0, 127), min_size=512, max_size=512).map(bytes))
def test_sums_are_those_of_the_standard_library(header):
    assert header_sums(header) == SLOWLY(header)


def test_the_largest_ascii_header_does_not_wrap_around():
    assert header_sums(b"\x7f" * 512) == SLOWLY(b"\x7f" * 512)


# No lone surrogates but those that stand for bytes that are not UTF-8: no other ones come from a file system.
NAMES = st.characters(exclude_characters="\0/", exclude_categories=["Cs"]) | st.characters(
    min_codepoint=0xDC80, max_codepoint=0xDCFF
)


@given(name=st.text(NAMES, min_size=1, max_size=20), size=st.integers(0, 8**11 - 1))
def test_headers_are_those_of_the_standard_library_and_read_back(name, size):
    member = tarfile.TarInfo(name)
    member.size = size
    slowly = member.tobuf(tarfile.USTAR_FORMAT, "utf-8", "surrogateescape")
    with quick_headers():
        assert member.tobuf(tarfile.USTAR_FORMAT, "utf-8", "surrogateescape") == slowly
        assert tarfile.TarInfo.frombuf(slowly, "utf-8", "surrogateescape").size == size
    assert tarfile.calc_chksums is SLOWLY
