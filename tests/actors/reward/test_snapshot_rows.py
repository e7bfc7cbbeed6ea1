"""A snapshot as numbers: rows keep their side as the log grows; traits, lengths and signals stay apart."""

from __future__ import annotations

import gc
import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from actors.reward.snapshot_rows import SnapshotRows, load_rows
from causalrm_ray.data.states.cache import StateCache
from causalrm_ray.types import PerUser


def load(path: Path, features: Callable[[Path], Path], per_user: PerUser = None) -> SnapshotRows:
    return load_rows(path, StateCache(features(path)), 64, per_user)


def test_a_row_keeps_its_side_and_its_fold_as_the_log_grows(
    make_snapshot: Callable[..., Path], features: Callable[[Path], Path]
) -> None:
    small, large = (load(make_snapshot(rows), features) for rows in (400, 800))
    assert small.heldout.tolist() == [row for row in large.heldout.tolist() if row < 400]
    assert small.fold.tolist() == large.fold.tolist()[:400]
    counts = torch.bincount(large.fold + 1).tolist()
    # a tenth stops, the others are halved: four standard errors of 800 draws
    assert abs(counts[0] - 80) < 4 * (800 * 0.1 * 0.9) ** 0.5
    assert abs(counts[1] - counts[2]) < 4 * (800 * 0.9) ** 0.5


def test_traits_of_few_values_make_strata_and_ids_do_not(
    make_snapshot: Callable[..., Path], features: Callable[[Path], Path]
) -> None:
    path = make_snapshot(800)
    table = pq.read_table(path)
    contexts = [json.dumps({"style": ("plain", "flashy")[number // 2 % 2], "session": str(number)}) for number in range(800)]
    pq.write_table(table.set_column(table.column_names.index("context"), "context", pa.array(contexts)), path)
    log = load(path, features)
    assert sorted(log.traits.names) == ["style=flashy", "style=plain"]
    plain = log.traits.names.index("style=plain")
    assert (log.traits.number == plain).tolist() == [number // 2 % 2 == 0 for number in range(800)]
    assert log.signals.names == ("downvote", "upvote")
    assert log.signals.labels == (0, 1)
    assert torch.equal(log.signals.place >= 0, log.observations.o == 1)
    assert torch.equal(log.signals.place[log.observations.o == 1].float(), log.observations.r[log.observations.o == 1])
    assert int(log.lengths.number.max()) + 1 == len(log.lengths.names) > 1


def test_a_graded_signal_is_two_in_diagnostics(make_snapshot: Callable[..., Path], features: Callable[[Path], Path]) -> None:
    path = make_snapshot(800)
    table = pq.read_table(path)
    signals = [signal and "stars" for signal in table["signal"].to_pylist()]
    pq.write_table(table.set_column(table.column_names.index("signal"), "signal", pa.array(signals)), path)
    log = load(path, features)
    assert (log.signals.names, log.signals.labels) == (("stars, low", "stars, high"), (0, 1))
    assert torch.equal(log.signals.place[log.observations.o == 1].float(), log.observations.r[log.observations.o == 1])


def test_users_keep_their_side_and_rows_of_a_user_are_a_cluster(
    make_snapshot: Callable[..., Path], features: Callable[[Path], Path]
) -> None:
    path = make_snapshot(800)
    table = pq.read_table(path)
    users = [f"user-{number % 160}" for number in range(800)]
    place = table.column_names.index("user")
    pq.write_table(table.set_column(place, "user", pa.array(users)), path)
    log = load(path, features)
    assert (log.split_by, log.warnings) == ("user", ())
    assert log.observations.cluster is not None
    heldout = set(log.heldout.tolist())
    for user in set(users):
        rows = [number for number, name in enumerate(users) if name == user]
        assert len({row in heldout for row in rows}) == 1
        assert len(set(log.fold[rows].tolist())) == len(set(log.observations.cluster[rows].tolist())) == 1
    assert len(log.observations.cluster.unique()) == 160


def test_too_few_prompts_to_split_by_are_a_warning(make_snapshot: Callable[..., Path], features: Callable[[Path], Path]) -> None:
    log = load(make_snapshot(800), features)  # six prompts in all
    assert log.split_by == "impression_id"
    assert "not split by prompt" in log.warnings[0]
    assert log.observations.cluster is None


def flooded(path: Path) -> Path:
    """Every fifth row is a bot's, upvoted; the others are of 150 users."""
    table = pq.read_table(path)
    bot = [number % 5 == 0 for number in range(len(table))]
    columns = {
        "user": pa.array(["bot" if one else f"user-{number % 150}" for number, one in enumerate(bot)]),
        "observed": pa.array(
            [1 if one else given for one, given in zip(bot, table["observed"].to_pylist(), strict=True)], pa.int8()
        ),
        "label": pa.array([1 if one else given for one, given in zip(bot, table["label"].to_pylist(), strict=True)], pa.int8()),
        "signal": pa.array(["upvote" if one else given for one, given in zip(bot, table["signal"].to_pylist(), strict=True)]),
    }
    for name, column in columns.items():
        table = table.set_column(table.column_names.index(name), name, column)
    pq.write_table(table, path)
    return path


def test_who_floods_is_named_and_counts_as_the_option_says(
    make_snapshot: Callable[..., Path], features: Callable[[Path], Path]
) -> None:
    path = flooded(make_snapshot(1000))
    whole, thinned = load(path, features), load(path, features, "auto")
    assert len(whole) == 1000
    (warning,) = [text for text in whole.warnings if "user 'bot'" in text]
    assert warning.startswith(f"user 'bot' gave 200 of {int(whole.observations.o.sum())} reactions (")
    assert warning.endswith("%): feedback.per_user caps this.")
    assert len(thinned) == 1000 - 180
    assert "by feedback.per_user, 20 of them count" in thinned.warnings[0]
    assert thinned.warnings[1].startswith("180 of 1000 impressions, 180 of them with feedback, are left out: no user counts for")
    rows = thinned.kept.tolist()
    assert sum(row % 5 == 0 for row in rows) == 20
    # what is left is what it was
    assert torch.equal(thinned.observations.r, whole.observations.r[thinned.kept])
    batch = thinned.token_rows(0).batch(torch.arange(5))
    whole_batch = whole.token_rows(0).batch(thinned.kept[:5])
    assert torch.equal(batch["lengths"], whole_batch["lengths"])
    assert torch.equal(batch["input_ids"], whole_batch["input_ids"])


def test_an_answer_with_much_of_the_feedback_is_named_by_its_impression(
    make_snapshot: Callable[..., Path], features: Callable[[Path], Path]
) -> None:
    path = make_snapshot(800)
    table = pq.read_table(path)
    same = [number % 7 == 0 for number in range(800)]
    for name in ("prompt", "response"):
        values = [table[name][0].as_py() if one else text for one, text in zip(same, table[name].to_pylist(), strict=True)]
        table = table.set_column(table.column_names.index(name), name, pa.array(values))
    pq.write_table(table, path)
    (warning,) = [text for text in load(path, features).warnings if "One answer" in text]
    assert "that of impression 'impression-" in warning
    assert table["response"][0].as_py() not in warning


def test_little_is_kept_of_a_row(make_snapshot: Callable[..., Path], features: Callable[[Path], Path]) -> None:
    path = make_snapshot(2000)
    load(path, features)  # what is made once
    gc.collect()
    tracemalloc.start()
    before, objects = tracemalloc.get_traced_memory()[0], len(gc.get_objects())
    log = load(path, features)  # its states are there
    gc.collect()
    kept = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert len(gc.get_objects()) - objects < 400, "no object of Python for each row"
    assert log.token_rows(0)._flat.element_size() == 4
    assert kept / 2000 < 120


def test_the_order_of_a_snapshot_changes_nothing(make_snapshot: Callable[..., Path], features: Callable[[Path], Path]) -> None:
    path = flooded(make_snapshot(1000))
    table = pq.read_table(path)
    contexts = [json.dumps({"style": ("plain", "flashy", "other")[number // 2 % 3]}) for number in range(1000)]
    for name, column in {"context": contexts, "time": [float(number // 50) for number in range(1000)]}.items():
        table = table.set_column(table.column_names.index(name), name, pa.array(column))
    table = table.sort_by([("time", "ascending"), ("impression_id", "ascending")])
    pq.write_table(table, path)
    expected = load(path, features, "auto")
    shuffled = np.random.default_rng(0).permutation(1000)
    pq.write_table(table.take(shuffled), path)
    found = load(path, features, "auto")
    assert torch.equal(torch.from_numpy(shuffled)[found.kept], expected.kept)
    index = torch.arange(len(expected))
    for name, values in expected.token_rows(0).batch(index).items():
        assert torch.equal(found.token_rows(0).batch(index)[name], values)
    for name in ("o", "r", "cluster"):
        assert torch.equal(getattr(found.observations, name), getattr(expected.observations, name))
    for name in ("heldout", "fold"):
        assert torch.equal(getattr(found, name), getattr(expected, name))
    for name in ("traits", "lengths"):
        assert torch.equal(getattr(found, name).number, getattr(expected, name).number)
        assert getattr(found, name).names == getattr(expected, name).names
    assert torch.equal(found.signals.place, expected.signals.place)
    assert (found.warnings, found.split_by) == (expected.warnings, expected.split_by)
