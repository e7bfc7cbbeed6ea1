"""Columns of a home-made log by our names: whole columns, paths into them, and names that hold dots."""

from __future__ import annotations

from typing import Any

import pytest

from causalrm_ray.data.mapping import ColumnMap

ROW = {
    "q": "hi",
    "id": 7,
    "choices": [{"message": {"content": "hello"}}, {"message": {"content": "last"}}],
    "meta": '{"user": {"name": "u1"}, "gone": null}',
    "rating.value": 4,
    "rating": {"value": 5},
}


@pytest.mark.parametrize(
    ("theirs", "value"),
    [
        ("q", "hi"),
        ("choices.0.message.content", "hello"),
        ("choices.-1.message.content", "last"),
        ("meta.user.name", "u1"),
        ("meta.gone", None),
        ("rating.value", 4),
    ],
)
def test_a_path_leads_to_its_value(theirs: str, value: Any) -> None:
    columns = ColumnMap({"ours": theirs})
    assert columns.has("ours", ROW)
    assert columns(ROW)["ours"] == value


@pytest.mark.parametrize(
    "theirs", ["a", "q.x", "choices.2.message", "choices.x", "meta.user.name.first", "meta.user.age", "id.0"]
)
def test_a_path_that_leads_nowhere_leaves_the_row_as_it_is(theirs: str) -> None:
    columns = ColumnMap({"ours": theirs})
    assert not columns.has("ours", ROW)
    assert columns(ROW) == ROW


def test_a_whole_column_is_there_once_and_names_may_be_exchanged() -> None:
    assert ColumnMap({"prompt": "q"})({"q": 1, "x": 2}) == {"prompt": 1, "x": 2}
    assert ColumnMap({"a": "b", "b": "a"})({"a": 1, "b": 2}) == {"a": 2, "b": 1}
    assert ColumnMap({"id": "id"})({"id": 1}) == {"id": 1}
    assert ColumnMap({"user": "meta.user"})({"meta": {"user": 3}}) == {"meta": {"user": 3}, "user": 3}


def test_names_to_search_a_file_for() -> None:
    assert ColumnMap({"label": "meta.vote"}).sources("label") == {"meta.vote", "meta", "vote"}
    assert ColumnMap({}).sources("label") == {"label"}
