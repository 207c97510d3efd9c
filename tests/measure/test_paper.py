"""The data of Table 1."""

from __future__ import annotations

import dataclasses

import pytest

import flopeq
from flopeq.measure.paper import Table1Row, table1
from flopeq.registry import MODELS


def test_the_table_has_the_papers_25_rows():
    rows = table1()
    assert len(rows) == 25
    assert [row.paper_name for row in rows[:2]] == ["ResMLP-L24", "E(ResMLP-L24)"]
    assert sum(row.variant == "X" for row in rows) == sum(row.variant == "E" for row in rows) == 11


def test_the_package_exports_the_table():
    assert flopeq.table1 is table1


def test_a_row_carries_the_printed_figures():
    [row] = [row for row in table1() if row.model == "flop_deit3_huge_patch14_224"]
    assert row == Table1Row("E(ViT-H)", "vit", "H", "E", "flop_deit3_huge_patch14_224", 316.1, 501, 87.3, 2598, 84.4)


def test_only_the_diverged_run_has_no_accuracy():
    assert [row.paper_name for row in table1() if row.top1 is None] == ["E(ViT-S)"]


def test_rows_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        table1()[0].top1 = 100.0  # pyright: ignore[reportAttributeAccessIssue]


def test_the_registry_names_the_same_models():
    for row in table1():
        info = MODELS[row.model]
        assert (info.paper_name, info.family, info.size, info.variant) == (
            row.paper_name, row.family, row.size, row.variant
        )  # fmt: skip
