"""Files behind URLs, against servers on this machine: S3 (moto), a web server, and fsspec's memory."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import boto3
import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from moto.server import ThreadedMotoServer

from causalrm_ray.data.readers.remote import without_secrets
from causalrm_ray.data.rows import SourceError
from causalrm_ray.data.sources import parts, read_rows

ROWS = [{"id": str(number), "prompt": "p", "response": "r"} for number in range(3)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


@pytest.fixture(scope="module")
def s3() -> Iterator[object]:
    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    _, port = server.get_host_and_port()
    endpoint = f"http://127.0.0.1:{port}"
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "AWS_ENDPOINT_URL": endpoint,
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "hush",
            "AWS_DEFAULT_REGION": "us-east-1",
        }.items():
            patch.setenv(name, value)
        client = boto3.client("s3", endpoint_url=endpoint)
        client.create_bucket(Bucket="logs")
        yield client
    server.stop()
    fsspec.get_filesystem_class("s3").clear_instance_cache()


def test_files_and_folders_of_s3_are_read(s3, tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "log.parquet")
    s3.put_object(Bucket="logs", Key="one/log.jsonl.gz", Body=gzip.compress(LINES))
    s3.put_object(Bucket="logs", Key="many/day=1/part-0.parquet", Body=(tmp_path / "log.parquet").read_bytes())
    s3.put_object(Bucket="logs", Key="many/_SUCCESS", Body=b"")
    assert [row.fields for row in read_rows("s3://logs/one/log.jsonl.gz")] == ROWS
    assert [row.fields for row in read_rows("s3://logs/many")] == [{**row, "day": "1"} for row in ROWS]
    assert [part.where for part in parts("s3://logs/many/")] == ["s3://logs/many/day=1/part-0.parquet"]
    s3.put_object(Bucket="logs", Key="many/notes.txt", Body=b"x")
    with pytest.raises(SourceError, match=r"s3://logs/many/? must hold only files of rows .*, got notes\.txt"):
        parts("s3://logs/many")


def test_what_is_missing_on_s3_is_named(s3) -> None:
    with pytest.raises(SourceError, match=r"s3://logs/nothing\.jsonl: no such file or folder"):
        parts("s3://logs/nothing.jsonl")


@pytest.fixture
def web(tmp_path: Path) -> Iterator[str]:
    (tmp_path / "log.jsonl").write_bytes(LINES)
    (tmp_path / "log.parquet").write_bytes(b"")
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "log.parquet")
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=str(tmp_path)))
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://user:hush@127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("name", ["log.jsonl", "log.parquet"])
def test_files_of_a_web_server_are_read(web: str, name: str) -> None:
    (part,) = parts(f"{web}/{name}?signature=hush")
    found = list(part.rows())
    assert [row.fields for row in found] == [row.fields for row in part.rows()] == ROWS
    assert "hush" not in found[0].where


def test_a_file_of_a_web_server_is_fetched_once(web: str, capfd: pytest.CaptureFixture[str]) -> None:
    (part,) = parts(f"{web}/log.jsonl")
    assert sum(1 for _ in part.rows()) == sum(1 for _ in part.suspects(["label"])) + 3 == 3
    assert capfd.readouterr().err.count("GET /log.jsonl") == 1


def test_a_web_page_that_is_missing_is_named_without_its_secrets(web: str) -> None:
    with pytest.raises(SourceError, match=r"nothing\.jsonl: no such file or folder") as caught:
        list(read_rows(f"{web}/nothing.jsonl?signature=hush"))
    assert "nothing.jsonl" in str(caught.value)
    assert "hush" not in str(caught.value)


def test_any_file_system_that_fsspec_knows_will_do() -> None:
    memory = fsspec.filesystem("memory")
    memory.pipe("/box/log.jsonl", LINES)
    assert [row.fields for row in read_rows("memory://box/log.jsonl")] == ROWS
    assert [row.fields for row in read_rows("memory://box")] == ROWS
    with pytest.raises(SourceError, match=r"memory://box/nothing\.csv: no such file"):
        parts("memory://box/nothing.csv")
    with pytest.raises(SourceError, match=r"nowhere://a/b\.csv must be readable"):
        parts("nowhere://a/b.csv")


@pytest.mark.parametrize(("url", "extra"), [("s3://a/b.csv", "s3"), ("gs://a/b.csv", "gcs")])
def test_a_missing_package_is_named_by_its_extra(url: str, extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(_: str) -> None:
        raise ImportError("no such package")

    monkeypatch.setattr("fsspec.url_to_fs", missing)
    with pytest.raises(SourceError, match=rf"a package for \w+:// is missing: pip install 'causalrm-ray\[{extra}\]'"):
        parts(url)


def test_urls_are_shown_without_what_must_not_be_seen() -> None:
    assert without_secrets("https://me:hush@host:1/a/b.csv?token=hush#x") == "https://host:1/a/b.csv"
