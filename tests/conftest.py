"""What all tests share: one Ray cluster per session, for a process can join one only; one PostgreSQL; the files' order."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import settings

from actors.cluster import runtime
from causalrm_ray.config.base import ClusterConfig

if TYPE_CHECKING:
    from postgres_server import PostgresServer

torch.set_num_threads(1)  # a process per core: with two threads each they spin, and one test took 40 times as long
settings.register_profile("any machine", deadline=None)  # that a machine is busy is no fault of the code
settings.load_profile("any machine")
TESTS = Path(__file__).parent
sys.path.insert(0, str(TESTS))  # postgres_server
LONGEST = ("jobs/lab/test_chaos.py", "jobs/test_end_to_end.py")  # minutes each, on clusters of their own


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files beside those without clusters: two clusters at once on two cores take longer than one after the other."""
    files = list(dict.fromkeys(item.path for item in items))
    longest = [TESTS / name for name in LONGEST if TESTS / name in files]
    light = [file for file in files if file.parent == TESTS or TESTS / "causalrm_ray" in file.parents]
    order = [*light, *(file for file in files if file not in {*light, *longest})]
    for number, file in enumerate(longest):  # the first at once, the second when half of the light ones are done
        order.insert(number * (len(light) // len(longest) + 1), file)
    items.sort(key=lambda item: order.index(item.path))


@pytest.fixture(scope="session")
def ray_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Ray on this machine, with a token of its own, for as long as the session lasts."""
    with runtime.ray_cluster(ClusterConfig(), tmp_path_factory.mktemp("ray")):
        yield


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    """A PostgreSQL of this session's own. Fails, and says what to install, where there is none."""
    from postgres_server import PostgresServer

    server = PostgresServer()
    yield server
    server.close()


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.postgres)])
def new_log_url(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Callable[[], str]:
    """Gives at each call the URL of a database without a log, of each kind in turn; on PostgreSQL the one before is dropped."""
    if request.param == "sqlite":
        return lambda: f"sqlite:///{tmp_path_factory.mktemp('log')}/log.db"
    server: PostgresServer = request.getfixturevalue("postgres")

    def emptied() -> str:  # a new database takes 10 times as long
        with server.connect() as connection:
            connection.execute("DROP SCHEMA IF EXISTS causalrm CASCADE")
        return server.url()

    return emptied


@pytest.fixture
def log_url(new_log_url: Callable[[], str]) -> str:
    """The URL of a database without a log, of each kind in turn."""
    return new_log_url()
