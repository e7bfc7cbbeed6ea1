"""Snapshots on disk: whole or not at all, equal after a round trip, refused with a clear error where they break a rule."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from causalrm_ray.data.snapshots.table import (
    SNAPSHOT_SCHEMA,
    SnapshotError,
    as_dataset,
    check_snapshot,
    read_batches,
    read_snapshot,
    write_batches,
    write_snapshot,
)


def row(name: str = "a", label: int | None = None, **changes) -> dict:
    given = {"observed": int(label is not None), "label": label, "signal": None if label is None else "click"}
    base = {
        "impression_id": name,
        "prompt": "p",
        "response": "r",
        "policy_version": 0,
        "time": 1.0,
        "user": None,
        "context": "{}",
    }
    return {**base, **given, **changes}


def table(*rows: dict) -> pa.Table:
    return pa.Table.from_pylist(list(rows), SNAPSHOT_SCHEMA)


texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)
rows = st.builds(
    row,
    name=texts,
    label=st.none() | st.integers(0, 1),
    prompt=texts,
    response=texts,
    policy_version=st.integers(0, 2**63 - 1),
    time=st.floats(0, 1e12),
    user=st.none() | texts,
)


@settings(max_examples=30, deadline=None)
@given(st.lists(rows, max_size=8, unique_by=lambda item: item["impression_id"]))
def test_round_trip_is_exact(tmp_path_factory, items: list[dict]):
    path = tmp_path_factory.mktemp("round") / "deep" / "snapshot.parquet"
    write_snapshot(Dataset(table(*items)), path)
    back = read_snapshot(path)
    assert back.to_list() == table(*items).to_pylist()
    assert back.data.schema.remove_metadata() == SNAPSHOT_SCHEMA


def test_selected_rows_are_the_ones_written(tmp_path: Path):
    dataset = Dataset(table(row("a"), row("b"), row("c"))).select([2, 0])
    write_snapshot(dataset, tmp_path / "s.parquet")
    assert read_snapshot(tmp_path / "s.parquet")["impression_id"][:] == ["c", "a"]


def test_failed_write_leaves_the_old_snapshot_and_no_debris(tmp_path: Path):
    path = tmp_path / "s.parquet"
    write_snapshot(Dataset(table(row("old"))), path)
    before = path.read_bytes()
    with pytest.raises(SnapshotError, match="the snapshot: impression_id must not repeat, got 1 different ids in 2 rows"):
        write_snapshot(Dataset(table(row("new"), row("new"))), path)
    blocked = tmp_path / "blocked"
    (blocked / "inside").mkdir(parents=True)
    with pytest.raises(OSError, match="irectory"):
        write_snapshot(Dataset(table(row("new"))), blocked)
    assert path.read_bytes() == before
    assert sorted(item.name for item in tmp_path.iterdir()) == ["blocked", "s.parquet"]


BROKEN = [
    (table(row()).drop_columns(["label"]), "must have the column 'label'"),
    (table(row()).append_column("oracle", [[1.0]]), r"must have only the columns .*, got also \['oracle'\]"),
    (table(row()).set_column(3, "observed", pa.array([0], pa.int64())), "observed must be int8, got int64"),
    (table(row(prompt=None)), "prompt must be given in every row, got 1 nulls"),
    (table(row(observed=2)), "observed must be 0 or 1, got {'observed': 2} in row 0"),
    (table(row("a"), row("b", observed=1)), "label must be given exactly where observed is 1, .*'label': None.* in row 1"),
    (table(row("a", 1, observed=0)), "label must be given exactly where observed is 1"),
    (table(row("a", 3)), "label must be 0 or 1, got {'label': 3"),
    (table(row("a", 1, signal=None)), "signal must be given exactly where observed is 1"),
    (table(row(time=float("nan"))), "time must be finite and at least 0"),
    (table(row(time=-1.0)), "time must be finite and at least 0"),
    (table(row(response="")), "response must not be empty"),
    (table(row(""), row("b")), "impression_id must not be empty"),
]


@pytest.mark.parametrize(("broken", "message"), BROKEN)
def test_broken_snapshot_is_refused_by_name(tmp_path: Path, broken: pa.Table, message: str):
    pq.write_table(broken, tmp_path / "s.parquet")
    with pytest.raises(SnapshotError, match=message):
        read_snapshot(tmp_path / "s.parquet")


def test_missing_or_torn_file_is_refused(tmp_path: Path):
    with pytest.raises(SnapshotError, match=r"none\.parquet must be a readable Parquet file"):
        read_snapshot(tmp_path / "none.parquet")
    (tmp_path / "torn.parquet").write_bytes(b"PAR1 but no more")
    with pytest.raises(SnapshotError, match=r"torn\.parquet must be a readable Parquet file"):
        read_snapshot(tmp_path / "torn.parquet")


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([], "must hold impressions, got 0 rows"),
        ([None, None], "must hold feedback, got 0 observed of 2 rows"),
        ([1, 0], "must hold what was shown without feedback too, got 2 rows, all with feedback"),
        ([1, None, 1], "both labels, got 2 of label 1 and 0 of label 0 in 2 observed of 3 rows"),
        ([0, None], "both labels, got 0 of label 1 and 1 of label 0 in 1 observed of 2 rows"),
    ],
)
def test_log_that_cannot_be_fitted_is_refused_with_its_counts(labels: list, message: str, tmp_path: Path):
    write_snapshot(Dataset(table(*(row(str(k), label) for k, label in enumerate(labels)))), tmp_path / "s.parquet")
    with pytest.raises(SnapshotError, match=message):
        check_snapshot(tmp_path / "s.parquet")


def test_log_with_both_labels_and_rows_without_feedback_can_be_fitted(tmp_path: Path):
    write_snapshot(Dataset(table(row("a", 1), row("b", 0), row("c"), row("d", 1))), tmp_path / "s.parquet")
    check_snapshot(tmp_path / "s.parquet")


def test_two_gib_of_text_are_no_limit_in_memory() -> None:
    """Forty batches of one text of 64 MiB, which they share: 2.5 GiB in one column."""
    texts = pa.array(["x" * 2**26], pa.string())
    one = table(row("a", 1)).to_batches()[0]
    batches = []
    for number in range(40):
        columns = {**dict(zip(one.schema.names, one.columns, strict=True)), "response": texts}
        columns["impression_id"] = pa.array([str(number)])
        if number % 2:
            columns |= {name: table(row("b")).column(name).chunk(0) for name in ("observed", "label", "signal")}
        batches.append(pa.RecordBatch.from_arrays(list(columns.values()), schema=SNAPSHOT_SCHEMA))
    dataset = as_dataset(batches)
    assert len(dataset) == 40
    assert dataset.data.nbytes > 2**31
    assert dataset.select([39, 0])["impression_id"][:] == ["39", "0"]


def test_batches_are_checked_one_by_one_and_ids_over_all(tmp_path: Path) -> None:
    path = tmp_path / "s.parquet"
    batches = [table(row(str(number), number % 3 if number % 3 < 2 else None)).to_batches()[0] for number in range(9)]
    write_batches(batches, path)
    assert [one for batch in read_batches(path) for one in batch["impression_id"].to_pylist()] == [str(n) for n in range(9)]
    check_snapshot(path)
    with pytest.raises(SnapshotError, match="must not repeat, got 9 different ids in 10 rows"):
        write_batches([*batches, batches[4]], path)
    with pytest.raises(SnapshotError, match=r"time must be finite .* in row 9"):
        write_batches([*batches, table(row("z", time=-1.0)).to_batches()[0]], path)
    assert len(read_snapshot(path)) == 9
    write_batches([], path)
    with pytest.raises(SnapshotError, match="got 0 rows"):
        check_snapshot(path)
