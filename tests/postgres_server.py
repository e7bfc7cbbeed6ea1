"""A real PostgreSQL for tests: Debian's, as an unprivileged user, in a temporary folder, on a free port of this machine alone."""

from __future__ import annotations

import itertools
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import psycopg

from actors.cluster.ports import free_port

START_S = 60.0
INSTALL = "install PostgreSQL's server (on Debian: apt-get install postgresql), or put its initdb and postgres on the PATH"
SETTINGS = (  # small, and safe against a killed server, though not against a power cut
    *("-c", "shared_buffers=32MB", "-c", "max_connections=40", "-c", "jit=off"),
    *("-c", "fsync=off", "-c", "full_page_writes=off"),
)


class PostgresServer:
    """A server that this process started; `stop` ends it by its pid, and `start` brings it back on the same port."""

    def __init__(self) -> None:
        self._bin = _binaries()
        self._owner = _unprivileged_user()
        self._folder = Path(tempfile.mkdtemp(prefix="causalrm-postgres-"))
        self._data, self._log = self._folder / "data", self._folder / "server.log"
        if self._owner:
            os.chown(self._folder, pwd.getpwnam(self._owner["user"]).pw_uid, -1)
        words = ("-D", self._data, "-U", "tests", "-A", "trust", "-E", "UTF8", "--locale=C.UTF-8", "--no-sync")
        subprocess.run([self._bin / "initdb", *words], check=True, capture_output=True, cwd=self._folder, **self._owner)
        self._names = (f"log_{number}" for number in itertools.count())
        self.port = free_port("127.0.0.1")
        self.start()

    def start(self) -> None:
        """Start the server and wait until it answers."""
        place = ("-D", self._data, "-h", "127.0.0.1", "-p", str(self.port), "-k", self._folder)
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(
                [self._bin / "postgres", *place, *SETTINGS], stdout=log, stderr=log, cwd=self._folder, **self._owner
            )
        deadline = time.monotonic() + START_S
        while True:
            try:
                self.connect().close()
                return
            except psycopg.OperationalError:
                if self.process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"PostgreSQL did not start: {self._log.read_text(errors='replace')}") from None
                time.sleep(0.05)

    def stop(self, how: signal.Signals = signal.SIGINT) -> None:
        """End the server: SIGINT ends its sessions first, SIGQUIT is as if it crashed."""
        self.process.send_signal(how)
        self.process.wait(timeout=START_S)

    def close(self) -> None:
        """End the server and delete its files."""
        if self.process.poll() is None:
            self.stop(signal.SIGQUIT)
        shutil.rmtree(self._folder)

    def connect(self, database: str = "postgres") -> psycopg.Connection[Any]:
        """A connection of the tests' own, each statement a transaction."""
        return psycopg.connect(host="127.0.0.1", port=self.port, user="tests", dbname=database, autocommit=True)

    def new_database(self) -> str:
        """The URL of an empty database."""
        name = next(self._names)
        with self.connect() as connection:
            connection.execute(f"CREATE DATABASE {name}")
        return self.url(name)

    def url(self, database: str = "postgres") -> str:
        """The URL of a database, as a user would write it."""
        return f"postgresql://tests@127.0.0.1:{self.port}/{database}"


def _binaries() -> Path:
    """The folder of initdb and postgres: of the PATH, else the newest of Debian's, which keeps them off it."""
    found = [Path(path).parent for path in [shutil.which("initdb")] if path]
    found += sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parent.name), reverse=True)
    for folder in found:
        if (folder / "initdb").exists() and (folder / "postgres").exists():
            return folder
    raise RuntimeError(f"tests of the log need PostgreSQL, found none: {INSTALL}")


def _unprivileged_user() -> dict[str, Any]:
    """Arguments of subprocess: PostgreSQL refuses to run as root, so that there it runs as the user whom Debian made for it."""
    if os.geteuid() != 0:
        return {}
    try:
        group = pwd.getpwnam("postgres").pw_gid
    except KeyError:
        raise RuntimeError(f"tests of the log run as root and need the user postgres, found none: {INSTALL}") from None
    return {"user": "postgres", "group": group, "extra_groups": []}
