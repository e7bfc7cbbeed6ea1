"""Wrong files of every kind, as people bring them: each is refused, whole, with one sentence that names the column or the value
and says what to do; nothing is imported, and no text of a person is shown."""

from __future__ import annotations

import gzip
import io
import json
import re
import zipfile
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from causalrm_ray.data.formats.native import Native
from causalrm_ray.data.log.import_log import import_log
from causalrm_ray.data.log.reading import Origin
from causalrm_ray.data.log.store import FeedbackLog
from causalrm_ray.data.snapshots.table import check_snapshot
from causalrm_ray.data.sources import read_prompts
from causalrm_ray.errors import InputError

SECRET = "my password is hunter2"
GOOD = {"prompt": f"{SECRET}, please", "response": f"{SECRET} é"}
LOG = [{**GOOD, "id": str(number), "label": number % 2} for number in range(40)]


def jsonl(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def labelled(labels: list[Any]) -> bytes:
    return jsonl([{**GOOD, "label": labels[number % len(labels)]} for number in range(40)])


def parquet(rows: list[Any]) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), file)
    return file.getvalue()


def archive() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as packed:
        packed.writestr("log.jsonl", jsonl(LOG))
    return file.getvalue()


Files = Mapping[str, bytes]
WRONG: dict[str, tuple[Files, Mapping[str, str], str]] = {
    "only a header": (
        {"log.csv": b"prompt,response,label\n"},
        {},
        "must hold rows, got 0; the file is empty or holds a header alone",
    ),
    "HTML instead of JSON": ({"log.jsonl": b"<!DOCTYPE html>\n<p>Log in</p>"}, {}, "got HTML or XML, often the page of a login"),
    "an object instead of a list": (
        {"log.json": json.dumps({"data": LOG, "next": 2}, indent=1).encode()},
        {},
        r"got the columns data, next; are the rows in data\? then make a file of them: `jq -c '\.data\[\]' FILE",
    ),
    "text in Latin-1": (
        {"log.jsonl": jsonl(LOG).decode().encode("latin-1")},
        {},
        "must be text in UTF-8, but 40 of its first 40 rows are not, the first of them row 1: convert the file, from Latin-1",
    ),
    "text in UTF-16": ({"log.csv": "prompt,response\na,b\n".encode("utf-16")}, {}, "UTF-16: convert it with `iconv -f UTF-16"),
    "no response": (
        {"log.jsonl": jsonl([{"prompt": SECRET, "reponse": SECRET, "label": 1}])},
        {},
        "no row has response: feedback.columns.response=reponse names its column",
    ),
    "unknown columns": (
        {"log.jsonl": jsonl([{"user_msg": SECRET, "bot_msg": SECRET, "ok": 1}])},
        {},
        "got the columns bot_msg, ok, user_msg; name its own: feedback.columns.prompt=COLUMN feedback.columns.response=COLUMN",
    ),
    "all labels the same": (
        {"log.jsonl": labelled([1, None])},
        {},
        "feedback must hold both labels, got 20 of label 1 and 0 of label 0 in 20 .* rows: import what users did not like, too",
    ),
    "prompts that are lists of texts": (
        {"log.jsonl": jsonl([{**GOOD, "prompt": [SECRET, SECRET]}])},
        {},
        "prompt: message 1 must be a JSON object with role and content, got a text of 22 characters",
    ),
    "stars as labels": (
        {"log.jsonl": labelled([None, 1, 2, 3, 4, 5])},
        {},
        r"label must be 0 or 1, got 1, 2, 3, 4, 5 in 26 rows, first in row 3; a scale is a signal with thresholds:"
        r" feedback\.columns\.grade=label feedback\.signals\.grade='\{low: 2, high: 4\}' reads values up to 2 as disliked and",
    ),
    "stars in a column of their own": (
        {"log.jsonl": jsonl([{**GOOD, "rating": None}, {**GOOD, "rating": 4}])},
        {},
        r"the column rating must be given a meaning, or its feedback is lost: feedback\.signals\.rating='\{low: LOW, high: ",
    ),
    "stars from 0 to 4, in a CSV": (
        {"log.csv": b"prompt,response,label\n" + b"".join(b"p,r,%d\n" % (number % 5) for number in range(20))},
        {},
        r"label must be 0 or 1, got '0', '1', '2', '3', '4' in 12 rows",
    ),
    "labels of 1 and -1": (
        {"log.parquet": parquet([{**GOOD, "label": label} for label in (1, -1, 1)])},
        {},
        r"label must be 0 or 1, got -1, 1 in 1 rows, first in row 2; a scale is a signal with thresholds:"
        r" feedback\.columns\.grade=label feedback\.signals\.grade='\{low: -0\.5, high: 0\.5\}'",
    ),
    "labels that are words": (
        {"log.jsonl": labelled(["up", "down", None])},
        {},
        r"label must be 0 or 1, got 'up', 'down' in 27 rows, first in row 1; words are signals:"
        r" feedback\.columns\.signal=label, and each has a meaning, such as"
        r" feedback\.signals\.up=1 if it is liked, =0 if disliked",
    ),
    "one label of another scale, late": (
        {"log.jsonl": labelled([0]) + labelled([1]) * 100 + labelled([7])},
        {},
        "label must be 0 or 1, got 0, 1, 7 in 40 rows, first in row 4041",
    ),
    "times in the future": (
        {"log.jsonl": jsonl([{**GOOD, "time": 4_000_000_000}])},
        {},
        "the first: .* time must not be in the future, got 2096-10-02 07:06 UTC",
    ),
    "a ZIP archive": ({"log.jsonl": archive()}, {}, "got a ZIP archive, as .xlsx files are too: unpack it"),
    "a sheet of Excel": ({"log.xlsx": archive()}, {}, r"must end in one of \.jsonl, .*, got '\.xlsx'"),
    "an empty file, packed": (
        {"log.jsonl.gz": gzip.compress(b"")},
        {},
        "must hold rows, got 0; the file, or what it packs, is empty",
    ),
    "an empty file of the ending .gz": ({"log.jsonl.gz": b""}, {}, "must hold rows, got 0; the file, or what it packs, is empty"),
    "a packed file that was cut": (
        {"log.jsonl.gz": gzip.compress(jsonl(LOG) * 50)[:-9]},
        {},
        "must be a whole file, but its packed content ends early or is damaged: copy it again",
    ),
    "a file of the ending .gz that is not packed": (
        {"log.jsonl.gz": jsonl(LOG)},
        {},
        r"must be packed as its ending \.gz says, got other first bytes: rename it",
    ),
    "Parquet that was cut": ({"log.parquet": parquet(LOG)[:-20]}, {}, "must be a readable Parquet file"),
    "a list that was cut": (
        {"log.json": json.dumps(LOG).encode()[:-1]},
        {},
        r"must end its list with '\]', but it ends after 40 rows: copy or export it again",
    ),
    "a folder with a file of an unknown ending": (
        {"logs/1.jsonl": jsonl(LOG), "logs/2.jsonl.gzip": gzip.compress(jsonl(LOG))},
        {},
        r"logs must hold only files of rows .*, got 2\.jsonl\.gzip: move it out of the folder, or convert it",
    ),
    "a folder with two schemas": (
        {"logs/1.jsonl": jsonl(LOG), "logs/users.csv": b"user,country\nu1,NL\n"},
        {},
        r"logs/users\.csv must have the columns of a known format, got the columns country, user; name its own",
    ),
    "a file that is not there": (
        {"log.jsonl": jsonl(LOG)},
        {"source": "lgo.jsonl"},
        r"lgo\.jsonl: no such .* did you mean .*/log\.jsonl",
    ),
    "a mapping of a column that is not there": (
        {"log.jsonl": jsonl(LOG)},
        {"user": "meta.user"},
        r"feedback\.columns\.user must name a column, .* no row has 'meta\.user'; there are id, label, prompt, response",
    ),
    "a mapping to a name that means nothing": (
        {"log.jsonl": jsonl(LOG)},
        {"lable": "label"},
        r"feedback\.columns\.lable: 'lable' is neither a column of the format native nor one of feedback\.signals",
    ),
    "a CSV with another delimiter than its header": (
        {"log.csv": f"prompt,response,label\n{SECRET};{SECRET};1\n".encode()},
        {},
        "row must have the 3 columns of the header, got 1: is a quote or the delimiter wrong?",
    ),
    "a CSV with a quote that never closes": (
        {"log.csv": f'prompt,response,label\np,"{SECRET},1\n'.encode()},
        {},
        "must be CSV, but row 1 below the header is not: unexpected end of data",
    ),
}


def refusal(files: Files, options: Mapping[str, str], folder: Path) -> tuple[str, int]:
    """What a user reads of an import of these files, and how many impressions the log holds then."""
    for name, data in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(data)
    source = folder / (options.get("source") or next(iter(files)).split("/")[0])
    columns = {name: value for name, value in options.items() if name != "source"}
    with closing(FeedbackLog(f"sqlite:///{folder}/db/log.db", {"upvote": 1, "downvote": 0})) as log:
        message = ""
        try:
            import_log(Origin(str(source), columns=columns), log, folder / "db" / "bad.jsonl")
            check_snapshot(log.seal(folder / "db", "log"))
        except InputError as error:
            message = str(error)
        return message, log.counts().impressions


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_file_is_refused_with_a_sentence(kind: str, tmp_path: Path) -> None:
    files, options, sentence = WRONG[kind]
    message, impressions = refusal(files, options, tmp_path)
    assert re.search(sentence, message), message
    assert SECRET not in message
    assert "hunter2" not in message
    assert "\n" not in message
    assert impressions == (40 if kind == "all labels the same" else 0)


def test_an_id_that_comes_again_with_other_content_is_quarantined_alone(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_bytes(jsonl([*LOG, {**LOG[0], "response": SECRET}]))
    with closing(FeedbackLog(f"sqlite:///{tmp_path}/db/log.db", {})) as log:
        report = import_log(str(tmp_path / "log.jsonl"), log, tmp_path / "db" / "bad.jsonl")
    assert (report.impressions, report.quarantined) == (40, 1)
    refused = json.loads((tmp_path / "db" / "bad.jsonl").read_text())
    assert (refused["row"], SECRET in refused["reason"]) == (41, False)
    assert "id '0' must keep its content, got response=a text of 24 characters then a text of 22" in refused["reason"]


def test_times_in_milliseconds_are_read_as_such_and_reported(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_bytes(jsonl([{**row, "time": 1_767_225_600_000 + int(row["id"])} for row in LOG]))
    with closing(FeedbackLog(f"sqlite:///{tmp_path}/db/log.db", {})) as log:
        report = import_log(str(tmp_path / "log.jsonl"), log, tmp_path / "db" / "bad.jsonl")
        assert max(row["time"] for row in log.snapshot()) == 1_767_225_600.039
    assert report.warnings == ("80 times were milliseconds, by their size, and are read so",)


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (b'["a", "b"]', "row must be a JSON object, got 'a'"),
        (jsonl([{"text": SECRET}]), "prompt must be a text that is not empty, got None"),
        (jsonl([{"prompt": [SECRET]}]), "prompt: message 1 must be a JSON object with role and content, got a text of 22"),
    ],
)
def test_wrong_prompts_are_refused_with_a_sentence(data: bytes, sentence: str, tmp_path: Path) -> None:
    (tmp_path / "prompts.json").write_bytes(data)
    with pytest.raises(InputError) as caught:
        read_prompts(str(tmp_path / "prompts.json"))
    assert sentence in str(caught.value)
    assert "hunter2" not in str(caught.value)


LATE = {"new.jsonl": labelled([1]) * 200 + labelled([3]), "new.jsonl.gz": gzip.compress(labelled([1]) * 200)[:-4]}


@pytest.mark.parametrize("name", LATE)
def test_nothing_of_a_source_remains_that_is_refused_late(name: str, tmp_path: Path) -> None:
    """In a log that holds rows already, too: they stay, and only they."""
    (tmp_path / "old.jsonl").write_bytes(jsonl(LOG))
    (tmp_path / name).write_bytes(LATE[name])
    with closing(FeedbackLog(f"sqlite:///{tmp_path}/db/log.db", {})) as log:
        import_log(str(tmp_path / "old.jsonl"), log, tmp_path / "db" / "bad.jsonl")
        before = log.counts()
        with pytest.raises(InputError):
            import_log(str(tmp_path / name), log, tmp_path / "db" / "bad.jsonl")
        assert log.counts() == before


BAD: list[Any] = [SECRET, [SECRET], {SECRET: SECRET}, [{"role": SECRET, "content": SECRET}], f"{SECRET}\0", f"{SECRET}\ud800", -1]
BAD += [
    [{"role": "user", "content": {SECRET: SECRET}}],
    [{"signal": SECRET}],
    [{"label": [SECRET], "time": SECRET}],
    f"[{SECRET}",
]
BAD += [SECRET * 20, True, [], {}, '{"%s": 1}' % SECRET]  # noqa: UP031


def test_no_reason_of_a_quarantined_row_shows_a_text_of_a_person(tmp_path: Path) -> None:
    """Whatever field it stands in, the id of the row or of its event included."""
    full = {"id": SECRET, "prompt": SECRET, "response": SECRET, "label": 1, "event_id": SECRET, "time": -1}
    bases = [GOOD, full, {"impression_id": SECRET, "label": 1, "value": "x"}, {"impression_id": "x", "signal": "upvote"}]
    columns = sorted(Native.columns)
    rows = [
        {**base, column: value}
        for base in bases
        for column in columns
        for value in BAD
        if not (column in ("label", "feedback") and isinstance(value, str | int))  # another scale, which refuses the file
    ]
    (tmp_path / "log.jsonl").write_bytes("".join(json.dumps(row) + "\n" for row in [{**GOOD, "topic": "é"}, *rows]).encode())
    with closing(FeedbackLog(f"sqlite:///{tmp_path}/db/log.db", {"upvote": 1})) as log:
        report = import_log(str(tmp_path / "log.jsonl"), log, tmp_path / "db" / "bad.jsonl")
    assert report.quarantined > len(rows) / 2
    reasons = [json.loads(line)["reason"] for line in (tmp_path / "db" / "bad.jsonl").read_text().splitlines()]
    assert [reason for reason in reasons if "hunter2" in reason] == []
