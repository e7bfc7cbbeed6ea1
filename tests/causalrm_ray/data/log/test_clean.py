"""Judged rows: read from what feedback.events may be, matched to a snapshot by id, refused by name."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from causalrm_ray.config.options import load_config
from causalrm_ray.conversation import Conversation
from causalrm_ray.data.log.clean import CleanSource, clean_source, match_clean
from causalrm_ray.data.log.store import FeedbackLog
from causalrm_ray.data.rows import SourceError
from causalrm_ray.types import Impression


def lines(path: Path, *rows: object) -> CleanSource:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return CleanSource(str(path))


def test_every_kind_of_source_is_read(tmp_path: Path) -> None:
    expected = {"a": 1, "b": 0, "7": 1}
    rows = [{"impression": "a", "label": 1}, {"impression": "b", "label": False}, {"impression_id": 7, "label": "yes"}]
    assert lines(tmp_path / "one.jsonl", *rows).read() == expected
    (tmp_path / "two.csv").write_text("label,impression,rater\n1,a,x\n0,b,y\ntrue,7,x\n1,a,y\n", encoding="utf-8")
    assert CleanSource(str(tmp_path / "two.csv")).read() == expected
    pq.write_table(pa.table({"impression": ["a", "b", "7"], "label": pa.array([1, 0, 1], pa.int8())}), tmp_path / "three.parquet")
    both = CleanSource((str(tmp_path / "three.parquet"), str(tmp_path / "one.jsonl")))
    assert both.read() == expected
    with closing(sqlite3.connect(tmp_path / "shop.db")) as database:
        database.execute("CREATE TABLE raters (impression TEXT, label INTEGER)")
        database.executemany("INSERT INTO raters VALUES (?, ?)", expected.items())
        database.commit()
    url = f"sqlite:///{tmp_path / 'shop.db'}"
    asked = [f"feedback.source={url}", "feedback.query=SELECT 1", "feedback.clean=SELECT impression, label FROM raters"]
    source = clean_source(load_config(None, asked).feedback)
    assert source is not None
    assert source.read() == expected
    beside = clean_source(load_config(None, [*asked[:2], f"feedback.clean={tmp_path / 'two.csv'}"]).feedback)
    assert beside is not None
    assert beside.read() == expected
    assert clean_source(load_config(None, []).feedback) is None


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"impression": "a", "label": 3}], r"feedback\.clean: .*clean\.jsonl row 1: label must be 0 or 1, got 3"),
        ([{"impression": "a", "label": "good"}], r"row 1: label must be 0 or 1, got 'good'"),
        (
            [{"impression": "a", "label": 1}, {"impression": "b"}],
            r"row 2: label must be 0 or 1, got none: leave out what was not",
        ),
        ([{"label": 1}], r"row 1: impression must be the id of an impression, a text or whole number, got None"),
        (
            [{"impression": "a", "label": 1}, {"impression": "a", "label": 0}],
            r"row 2: impression 'a' must have one label, got 0 and 1: settle it",
        ),
        ([], r"feedback\.clean must hold rows of impression and label, got 0 rows"),
    ],
)
def test_what_is_no_judgement_is_refused_by_row(tmp_path: Path, rows: list[object], message: str) -> None:
    with pytest.raises(SourceError, match=message):
        lines(tmp_path / "clean.jsonl", *rows).read()


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"absent\.csv"):
        CleanSource(str(tmp_path / "absent.csv")).read()


def test_judged_rows_are_matched_to_a_snapshot_as_of_its_time(tmp_path: Path) -> None:
    log = FeedbackLog(f"sqlite:///{tmp_path / 'log.db'}", {"upvote": 1})
    log.append([Impression(f"i-{n}", Conversation.user("hi"), "hello", 0, float(n)) for n in range(4)])
    labels = {"i-1": 1, "i-3": 0, "i-9": 1}
    found, counts = match_clean(labels, log.seal(tmp_path, "all"))
    np.testing.assert_array_equal(found, np.array([np.nan, 1, np.nan, 0], dtype=np.float32))
    assert (counts.matched, counts.unmatched, counts.missing) == (2, 1, "i-9")
    assert counts.warnings == ("1 of 3 rows of feedback.clean are of impressions that the log does not hold: they are left out.",)
    earlier, counts = match_clean(labels, log.seal(tmp_path, "early", 2.0))
    np.testing.assert_array_equal(earlier, np.array([np.nan, 1, np.nan], dtype=np.float32))
    assert (counts.matched, counts.unmatched) == (1, 2)
    assert match_clean({"i-0": 1}, tmp_path / "snapshots" / "all.parquet")[1].warnings == ()
    with pytest.raises(SourceError, match=r"got 1 ids of which the log holds none, the first 'x': log answers with `id`"):
        match_clean({"x": 1}, tmp_path / "snapshots" / "all.parquet")
    log.close()
