"""What is committed stays, once: writers at once, killed ones, and a server that goes away and returns."""

from __future__ import annotations

import random
import signal
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from log_writers import SIGNALS, batch, go, kill_an_append, kill_an_import, start, write_source
from postgres_server import PostgresServer

from causalrm_ray.data.log import database
from causalrm_ray.data.log.store import FeedbackLog, LogCounts
from causalrm_ray.errors import InputError

pytestmark = pytest.mark.timeout(180)


def test_writers_at_once_lose_and_repeat_nothing(log_url: str):
    writers = [start("append", log_url, name, 40, 5) for name in ("a", "b")]
    for writer in writers:
        go(writer)
    for writer in writers:
        writer.communicate(timeout=60)
        assert writer.returncode == 0
    with closing(FeedbackLog(log_url, SIGNALS)) as log:
        assert log.counts() == LogCounts(400, 400, 0, 0, 0, 0, redelivered=0, forgotten=0)
        assert log.position() == 800
        positions = [seq for seq, _ in log.stream()]
        assert len(set(positions)) == 400
        assert all(row["label"] == 1 for row in log.snapshot())


@pytest.mark.parametrize("moment", range(3))
def test_a_killed_writer_leaves_every_reported_batch_and_no_half_one(log_url: str, moment: int):
    kill_an_append(log_url, "a", random.Random(moment).uniform(0, 0.2))


def test_a_killed_import_goes_on_where_it_was_ended(log_url: str, tmp_path: Path):
    kill_an_import(log_url, write_source(tmp_path / "log.jsonl", 10_000), 10_000, 0.3)


@pytest.fixture
def server() -> Iterator[PostgresServer]:
    """A PostgreSQL that a test may stop."""
    own = PostgresServer()
    yield own
    own.close()


@pytest.mark.postgres
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGQUIT], ids=["restarted", "crashed"])
def test_a_server_that_returns_is_waited_for(server: PostgresServer, how: signal.Signals):
    batches, size, third = 60, 20, threading.Event()

    def write(log: FeedbackLog) -> None:
        for number in range(batches):
            log.append(*batch("a", number, size))
            if number == batches // 3:
                third.set()

    with closing(FeedbackLog(server.url(), SIGNALS)) as log:
        writer = threading.Thread(target=write, args=(log,))
        writer.start()
        assert third.wait(60)
        for _ in range(2):
            server.stop(how)
            server.start()
        writer.join(120)
        assert not writer.is_alive()
        counts = log.counts()
        assert (counts.impressions, counts.events, log.position()) == (batches * size, batches * size, 2 * batches * size)
        assert counts.redelivered % (2 * size) == 0, "a batch whose answer was lost, whole"
        assert len(log.snapshot()) == batches * size


@pytest.mark.postgres
def test_a_server_that_stays_away_is_an_error_in_time(server: PostgresServer, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(database, "RECONNECT_S", 0.5)
    with closing(FeedbackLog(server.url(), SIGNALS)) as log:
        log.append(*batch("a", 0, 2))
        server.stop()
        for use in (log.position, log.snapshot, lambda: log.append(*batch("a", 1, 2))):
            with pytest.raises(InputError, match=r"feedback.url: the log postgresql\S+ cannot be used: .*refused"):
                use()
        server.start()
        assert log.append(*batch("a", 1, 2)).impressions == 2
        assert log.counts().impressions == 4
