"""Damaged files: each is refused in one clear line, passed over for an older whole one, or read as if nothing had happened.

Every kind of file is damaged in every way, a few times each from a fixed seed. What is written by us must never be read as
something else; of a log that users bring, which carries no hash, only the rows that were hit may change.
"""

from __future__ import annotations

import bz2
import contextlib
import csv
import gzip
import json
import lzma
import random
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset
from safetensors.numpy import save_file

from causalrm_ray.checkpoint import MANIFEST, atomic_folder, newest_complete, write_json
from causalrm_ray.config.options import dump_config, load_config
from causalrm_ray.config.train import Config
from causalrm_ray.conversation import Conversation
from causalrm_ray.data.embeddings import load_embeddings, write_embeddings
from causalrm_ray.data.graded import read_graded
from causalrm_ray.data.log.import_log import import_log
from causalrm_ray.data.log.reading import Origin
from causalrm_ray.data.log.store import FeedbackLog
from causalrm_ray.data.rollouts import read_rollout, write_rollout
from causalrm_ray.data.rows import Quarantine
from causalrm_ray.data.shards import read_states, write_states
from causalrm_ray.data.snapshots.table import SNAPSHOT_SCHEMA, read_snapshot, write_snapshot
from causalrm_ray.data.sources import read_prompts
from causalrm_ray.errors import ConfigError, InputError
from causalrm_ray.models.checks.files import check_weights
from causalrm_ray.types import Completion, FeedbackEvent, Impression, Prompt, Scored, Span
from jobs.__main__ import main
from jobs.plan import read_measured
from jobs.support.run_folder import Run

SIGNALS = {"upvote": 1, "downvote": 0}
ROWS = 40
EACH = 3  # damaged files of each kind and way


def _rng(*names: object) -> random.Random:
    return random.Random(repr(names))


# ---- ways of damage: bytes -> other bytes


def _flip(data: bytes, rng: random.Random) -> bytes:
    place = rng.randrange(len(data))
    return data[:place] + bytes([data[place] ^ 1 << rng.randrange(8)]) + data[place + 1 :]


def _blank(data: bytes, rng: random.Random) -> bytes:
    first = rng.randrange(len(data))
    last = min(len(data), first + 512)
    return data[:first] + bytes(last - first) + data[last:]


WAYS: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "a bit flipped": _flip,
    "cut short": lambda data, rng: data[: rng.randrange(1, len(data))],
    "empty": lambda data, rng: b"",
    "a block of zeros": _blank,
    "something else": lambda data, rng: rng.randbytes(len(data)),
    "more at its end": lambda data, rng: data + rng.randbytes(rng.randrange(1, 100)),
}


# ---- kinds of files that we write: make the file, read what it means


def _snapshot() -> Dataset:
    observed = [number % 2 for number in range(ROWS)]
    labels = [(number // 2) % 2 if number % 2 else None for number in range(ROWS)]
    columns = {
        "impression_id": [f"i{number}" for number in range(ROWS)],
        "prompt": [f"tell me about {number}" for number in range(ROWS)],
        "response": [f"answer {number}" for number in range(ROWS)],
        "observed": observed,
        "label": labels,
        "signal": [None if label is None else ("downvote", "upvote")[label] for label in labels],
        "policy_version": [0] * ROWS,
        "time": [float(number) for number in range(ROWS)],
        "user": [None] * ROWS,
        "context": ["{}"] * ROWS,
    } | {name: [None] * ROWS for name in ("conversation_id", "model", "logprob", "asked_for_feedback")}
    return Dataset(pa.table({field.name: pa.array(columns[field.name], field.type) for field in SNAPSHOT_SCHEMA}))


def _make_checkpoints(folder: Path) -> None:
    for step in (1, 2):
        with atomic_folder(folder / f"step-{step}") as draft:
            (draft / "learner" / "engine").mkdir(parents=True)
            torch.save({"weights": torch.full((20,), float(step))}, draft / "learner" / "engine" / "mp_rank_00_model_states.pt")
            (draft / "learner" / "state.json").write_text(json.dumps({"version": step, "algorithm": "grpo"}), encoding="utf-8")
            save_file({"w": np.full(20, step, np.float32)}, draft / "model.safetensors")
            write_json(draft / "facts.json", {"step": step, "serving": {"reward": {"folder": "reward/log/dr", "version": 1}}})


def _read_checkpoints(folder: Path) -> dict[str, bytes]:
    """What a run would go on from: by file, but for the manifest, which may differ in blanks."""
    found, _ = newest_complete(folder)
    assert found is not None, "the older checkpoint is whole"
    files = [file for file in found.rglob("*") if file.is_file() and file.name != MANIFEST]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def _make_log(path: Path) -> None:
    log = FeedbackLog(f"sqlite:///{path}", SIGNALS)
    shown = [
        Impression(f"i{n}", Conversation.user(f"tell me about {n}"), f"answer {n}", 0, float(n), None, {"style": "plain"})
        for n in range(ROWS)
    ]
    done = [FeedbackEvent(f"e{n}", f"i{n}", ("upvote", "downvote")[n % 3 == 0], 1.0, n + 0.5) for n in range(0, ROWS, 2)]
    done += [FeedbackEvent(f"w{n}", f"i{n}", "retract", 1.0, n + 0.7, f"e{n}") for n in range(0, ROWS, 10)]
    log.append(shown, done)
    log.close()


def _read_log(path: Path) -> list[dict[str, Any]]:
    log = FeedbackLog(f"sqlite:///{path}", SIGNALS)
    try:
        return list(log.snapshot())
    finally:
        log.close()


def _answers() -> list[Scored]:
    done = [
        Completion(
            Prompt(f"p/{n}", Conversation.user(f"why {n}"), (1, n)),
            f"so {n}",
            (3, n, 5),
            (-0.5, -0.25 * n, -1.0),
            "stop",
            4,
            (Span(4, 3),),
        )
        for n in range(1, ROWS)
    ]
    return [Scored(completion, 0.1 * number, 2) for number, completion in enumerate(done)]


CONFIG = """run: {name: mine, seed: 3}
model: {policy: embedded, max_length: 120}
rollout:
  temperature: 0.9   # an ordinary file
learner: {algorithm: grpo, lr: 2.0e-4, kl: {coefficient: 0.1}}
feedback: {signals: {share: 1}}
"""


def _make_model(folder: Path) -> None:
    folder.mkdir()
    save_file({"w": np.ones(20, np.float32)}, folder / "model.safetensors")


class Kind(NamedTuple):
    """`make` writes a file or folder, `file` is what of a folder gets damaged, `read` gives what it means.

    `older` takes away what is damaged: its meaning is then that of the whole state before, which may be read instead.
    """

    make: Callable[[Path], object]
    read: Callable[[Path], Any]
    file: str = ""
    older: Callable[[Path], object] | None = None


def _checkpoint(file: str) -> Kind:
    return Kind(_make_checkpoints, _read_checkpoints, f"step-2/{file}", lambda folder: shutil.rmtree(folder / "step-2"))


def _tensors(path: Path) -> Any:
    data = load_embeddings(path)
    return data.features.tolist(), data.levels.tolist()


FEATURES, LEVELS = np.arange(120, dtype=np.float32).reshape(40, 3), np.arange(40, dtype=np.float32)
OURS = {
    "manifest": _checkpoint("manifest.json"),
    "facts": _checkpoint("facts.json"),
    "weights": _checkpoint("model.safetensors"),
    "learner state": _checkpoint("learner/state.json"),
    "DeepSpeed state": _checkpoint("learner/engine/mp_rank_00_model_states.pt"),
    "configuration of a run": Kind(lambda path: dump_config(Config(), path), load_config),
    "log database": Kind(_make_log, _read_log),
    "snapshot": Kind(lambda path: write_snapshot(_snapshot(), path), lambda path: read_snapshot(path).to_list()),
    "rollout": Kind(lambda path: write_rollout(_answers(), path), read_rollout),
    "embeddings": Kind(lambda path: write_embeddings(path, FEATURES, LEVELS), _tensors),
    "states of a shard": Kind(
        lambda path: write_states(path, FEATURES, ["", "too long"] * 20),
        lambda path: [np.asarray(part).tolist() for part in read_states(path)],
    ),
}
FLIPS = 12


def _times(way: str) -> int:
    return FLIPS if way == "a bit flipped" else EACH


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", OURS)
def test_what_we_wrote_is_refused_passed_over_or_read_as_it_was(kind: str, way: str, tmp_path: Path) -> None:
    OURS[kind].make(tmp_path / "whole")
    for number in range(_times(way)):
        path = tmp_path / f"damaged-{number}"
        _copy(tmp_path / "whole", path)
        _check(OURS[kind], path, way, _rng(kind, way, number))


def _check(kind: Kind, path: Path, way: str, rng: random.Random) -> None:
    whole = kind.read(path)
    _damage(path / kind.file if kind.file else path, way, rng)
    found, refusal = None, None
    try:
        found = kind.read(path)
    except (InputError, ConfigError) as error:
        refusal = str(error)
    if refusal is not None:
        assert path.name in refusal, f"{refusal} names no file"
        return
    if kind.older and found != whole:
        kind.older(path)
        whole = kind.read(path)
    assert found == whole, f"{way}: read as something else"


def _damage(file: Path, way: str, rng: random.Random) -> None:
    file.write_bytes(WAYS[way](file.read_bytes(), rng))


def _copy(whole: Path, path: Path) -> None:
    if whole.is_dir():
        shutil.copytree(whole, path)
    else:
        shutil.copy(whole, path)


def test_a_bit_in_every_third_byte_of_embeddings_and_configurations_is_covered(tmp_path: Path) -> None:
    for kind in ("embeddings", "configuration of a run"):
        make, read, *_ = OURS[kind]
        path = tmp_path / kind
        make(path)
        data, whole = path.read_bytes(), read(path)
        for place in range(0, len(data), 3):
            path.write_bytes(data[:place] + bytes([data[place] ^ 1 << place % 8]) + data[place + 1 :])
            with contextlib.suppress(InputError, ConfigError):
                assert read(path) == whole, f"{kind}: bit {place % 8} of byte {place}"


# ---- files of others, without a hash: an error of ours at most, and what was not hit stays as it was


def _rows() -> list[dict[str, Any]]:
    return [
        {"id": f"i{n}", "prompt": f"tell me about {n}", "response": f"answer {n} é", "label": n % 2, "time": 1.5 * n, "score": n}
        for n in range(ROWS)
    ]


def _make_jsonl(path: Path) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in _rows()), encoding="utf-8")


def _import(path: Path) -> list[dict[str, Any]]:
    log = FeedbackLog(f"sqlite:///{path.parent}/log-{path.name}.db", SIGNALS)
    try:
        report = import_log(str(path), log, path.parent / f"bad-{path.name}.jsonl")
        assert report.rows == report.impressions + report.duplicate_impressions + report.quarantined
        return list(log.snapshot())
    finally:
        log.close()


def _grade(path: Path) -> list[Any]:
    with (path.parent / f"bad-{path.name}.jsonl").open("w", encoding="utf-8") as file:
        return list(read_graded(str(path), Quarantine(file)))


def _make_perf(path: Path) -> None:
    figure = {"name": "rollout", "case": "26M 32x64", "value": 0.9, "details": {"ours_s": 1.3, "tokens": 1987.0}}
    write_json(path, {"cores": 2, "figures": [figure]})


def _make_csv(path: Path) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(_rows()[0]))
        writer.writeheader()
        writer.writerows(_rows())


def _make_list(path: Path) -> None:
    path.write_text(json.dumps(_rows(), indent=1, ensure_ascii=False), encoding="utf-8")


def _packed(pack: Callable[[bytes], bytes], make: Callable[[Path], object] = _make_jsonl) -> Callable[[Path], object]:
    def packed(path: Path) -> None:
        make(path)
        path.write_bytes(pack(path.read_bytes()))

    return packed


def _make_shop(path: Path) -> None:
    with contextlib.closing(sqlite3.connect(path)) as shop:
        shop.execute("CREATE TABLE shown (id, prompt, response, label, time)")
        shop.executemany("INSERT INTO shown VALUES (:id, :prompt, :response, :label, :time)", _rows())
        shop.commit()


def _import_query(path: Path) -> list[dict[str, Any]]:
    log = FeedbackLog(f"sqlite:///{path.parent}/log-{path.name}.db", SIGNALS)
    try:
        import_log(Origin(f"sqlite:///{path}", query="SELECT * FROM shown"), log, path.parent / f"bad-{path.name}.jsonl")
        return list(log.snapshot())
    finally:
        log.close()


def _make_dataset(folder: Path) -> None:
    Dataset.from_list(_rows()).save_to_disk(folder)


THEIRS = {
    "log.jsonl": Kind(_make_jsonl, _import),
    "log.parquet": Kind(lambda path: pq.write_table(pa.Table.from_pylist(_rows()), path), _import),
    "log.csv": Kind(_make_csv, _import),
    "list.json": Kind(_make_list, _import),
    "log.jsonl.gz": Kind(_packed(gzip.compress), _import),
    "list.json.bz2": Kind(_packed(bz2.compress, _make_list), _import),
    "log.csv.xz": Kind(_packed(lzma.compress, _make_csv), _import),
    "log.jsonl.zst": Kind(_packed(lambda data: pa.compress(data, "zstd", asbytes=True)), _import),
    "shop.db": Kind(_make_shop, _import_query),
    "graded.jsonl": Kind(_make_jsonl, _grade),
    "prompts.jsonl": Kind(_make_jsonl, lambda path: read_prompts(str(path))),
    "dataset state": Kind(_make_dataset, _import, "state.json"),
    "dataset rows": Kind(_make_dataset, _import, "data-00000-of-00001.arrow"),
    "config.yaml": Kind(lambda path: path.write_text(CONFIG, encoding="utf-8"), load_config),
    "model": Kind(_make_model, lambda path: check_weights(str(path)), "model.safetensors"),
    "perf.json": Kind(_make_perf, read_measured),
    "embeddings.safetensors": Kind(lambda path: save_file({"embeddings": FEATURES, "labels": LEVELS}, path), _tensors),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", THEIRS)
def test_damage_to_what_a_user_brings_is_reported_in_a_line(kind: str, way: str, tmp_path: Path) -> None:
    for number in range(_times(way)):
        path = tmp_path / f"{number}-{kind.replace(' ', '-')}"
        THEIRS[kind].make(path)
        file = path / THEIRS[kind].file if THEIRS[kind].file else path
        _damage(file, way, _rng(kind, way, number))
        with contextlib.suppress(InputError, ConfigError):
            THEIRS[kind].read(path)


@pytest.mark.parametrize("number", range(FLIPS))
def test_a_flipped_bit_of_a_log_changes_no_row_but_those_that_it_hit(number: int, tmp_path: Path) -> None:
    whole, path = tmp_path / "whole.jsonl", tmp_path / "log.jsonl"
    _make_jsonl(whole)
    shutil.copy(whole, path)
    _damage(path, "a bit flipped", _rng("hit", number))
    before, after = _import(whole), _import(path)
    assert sum(row not in after for row in before) <= 2, "a line break lost joins two rows"
    assert sum(row not in before for row in after) <= 1


def test_more_than_fifty_files_are_damaged() -> None:
    assert (len(OURS) + len(THEIRS)) * sum(map(_times, WAYS)) >= 500


# ---- the command line: exit status 2 and one short message, before anything heavy starts


def test_the_command_line_reports_damage_in_a_few_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = _rng("command line")
    run, config, train = tmp_path / "runs" / "mine", tmp_path / "config.yaml", tmp_path / "train.safetensors"
    dump_config(load_config(None, [f"run.dir={tmp_path / 'runs'}", "run.name=mine"]), run / "config.yaml")
    _damage(run / "config.yaml", "a block of zeros", rng)
    config.write_bytes(rng.randbytes(200))
    write_embeddings(train, FEATURES, LEVELS)
    _damage(train, "cut short", rng)
    place = f"run.dir={tmp_path / 'runs'}"
    for job, damaged, options in (
        ("train-policy", "mine/config.yaml", [place, "run.name=mine", "run.resume=true"]),
        ("train-policy", "config.yaml", ["--config", str(config)]),
        ("benchmark", "train.safetensors", [place, f"train={train}", f"test={train}"]),
    ):
        assert main([job, *options]) == 2
        printed = capsys.readouterr().err
        assert damaged in printed
        assert printed.count("\n") <= 6, printed


def test_a_damaged_line_of_metrics_is_named_and_a_half_written_last_one_dropped(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 0}\n{"step": 1}\n{"st', encoding="utf-8")
    assert [row["step"] for row in Run.read_metrics(tmp_path)] == [0, 1]
    for line in ('{"st\n', "[]\n", '{"step": null}\n', "[" * 100_000 + "\n"):
        file.write_text(f'{{"step": 0}}\n{line}', encoding="utf-8")
        with pytest.raises(InputError, match=r"metrics\.jsonl line 2 must"):
            Run.read_metrics(tmp_path)


def test_a_row_of_a_rollout_that_lacks_a_value_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "step-0.parquet"
    write_rollout(_answers(), path)
    table = pq.read_table(path)
    for name, nothing in (("reward", [None] * len(table)), ("token_ids", [[3, None]] * len(table))):
        column = pa.array(nothing, table.schema.field(name).type)
        pq.write_table(table.set_column(table.schema.get_field_index(name), table.schema.field(name), column), path)
        with pytest.raises(InputError, match=rf"{name} must be given in every row, got {len(table)} nulls"):
            read_rollout(path)


def test_a_row_that_was_altered_in_a_whole_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "log.db"
    _make_log(path)
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("UPDATE causalrm_impressions SET response = 'other' WHERE id = 'i7'")
    with pytest.raises(InputError, match=r"log\.db is damaged: causalrm_impressions 'i7' is not as it was written"):
        _read_log(path)


def test_a_log_that_lost_rows_is_refused(tmp_path: Path) -> None:
    _make_log(tmp_path / "log.db")
    with contextlib.closing(sqlite3.connect(tmp_path / "log.db")) as connection, connection:
        connection.execute("DELETE FROM causalrm_events WHERE id = 'e2'")
    with pytest.raises(InputError, match="must hold 64 rows, got 63"):
        _read_log(tmp_path / "log.db")
