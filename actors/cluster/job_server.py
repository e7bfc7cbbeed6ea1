"""A cluster's job server, by Ray's own client: a submitted job runs on after the process that submitted it has ended."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import aiohttp
from ray._raylet import AuthenticationTokenLoader  # pyrefly: ignore[missing-module-attribute] (compiled)
from ray.exceptions import AuthenticationError
from ray.job_submission import JobStatus, JobSubmissionClient

from causalrm_ray.errors import InputError

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
STOP_WAIT = {"RAY_JOB_STOP_WAIT_TIME_S": "600"}  # from SIGTERM to SIGKILL: a step and a checkpoint must fit in; Ray's own is 3
LEFT_OUT = ("/runs", ".git", ".venv", "venv", "__pycache__", "*.egg-info", ".*_cache", ".hypothesis", "/build", "/dist")
CHATTY = (  # loggers with a line for each file that is left out, each upload and each closed connection
    "ray._private.runtime_env",
    "ray.dashboard.modules.dashboard_sdk",
    "ray.dashboard.modules.job.sdk",
)


@dataclass(frozen=True, slots=True)
class Submission:
    """A job as its cluster describes it. `exit_status` is None until it has ended; `facts` are what it was submitted with."""

    id: str
    state: str
    command: str
    message: str
    exit_status: int | None
    facts: Mapping[str, str]
    start: datetime | None
    end: datetime | None


class JobServer:
    """Submit, follow, look up and stop jobs.

    Sends the token that Ray finds: RAY_AUTH_TOKEN, the file at RAY_AUTH_TOKEN_PATH, or ~/.ray/auth_token. Every method raises
    InputError where nothing answers, the token is refused, or the server rejects the request.
    """

    def __init__(self, address: str | None) -> None:
        """`address` as http://host:port; if None, what the environment names, or this machine's."""
        if address:
            os.environ["RAY_API_SERVER_ADDRESS"] = address  # else one that is set there would win
        named = map(os.environ.get, ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"))
        self._server = address or next(filter(None, named), DEFAULT_ADDRESS)
        for name in CHATTY:
            logging.getLogger(name).setLevel(logging.ERROR)
        with self._errors():
            tokens = AuthenticationTokenLoader.instance()
            tokens.reset_cache()  # it keeps the first that this process saw
            # Whatever RAY_AUTH_MODE says: it is about clusters that are started here.
            headers = tokens.get_token_for_http_header(ignore_auth_mode=True)
            self._client = JobSubmissionClient(self._server, headers=headers)

    @property
    def address(self) -> str:
        """Where the server is, as http://host:port."""
        return self._client.get_address()

    def submit(
        self,
        command: Sequence[str],
        working_dir: Path,
        env: Mapping[str, str],
        facts: Mapping[str, str],
        id: str | None = None,
    ) -> str:
        """Send `working_dir` and run `command` in it, with `env` on top of the cluster's. Returns the submission's id."""
        if not working_dir.is_dir():
            raise InputError(f"submit.working_dir must be a folder, got {working_dir}")
        runtime = {"working_dir": str(working_dir), "excludes": list(LEFT_OUT), "env_vars": {**STOP_WAIT, **env}}
        with self._errors():
            return self._client.submit_job(
                entrypoint=shlex.join(command), runtime_env=runtime, metadata=dict(facts), submission_id=id
            )

    def follow(self, id: str, write: Callable[[str], None]) -> None:
        """`write` the job's log, from its beginning, as it grows, until the job ends. Raises ConnectionError if it breaks off."""
        with self._errors():
            self._client.get_job_info(id)
        try:
            asyncio.run(self._tail(id, write))
        except (aiohttp.ClientError, RuntimeError) as error:
            raise ConnectionError(f"the log of {id} broke off: {error}") from error

    async def _tail(self, id: str, write: Callable[[str], None]) -> None:
        async for text in self._client.tail_job_logs(id):
            write(text)

    def look(self, id: str) -> Submission:
        """What the cluster knows of the job."""
        with self._errors():
            return _submission(self._client.get_job_info(id))

    def all(self) -> list[Submission]:
        """All that were submitted, the oldest first."""
        with self._errors():
            jobs = self._client.list_jobs()
        found = [_submission(job) for job in jobs if job is not None and job.submission_id]
        return sorted(found, key=lambda job: str(job.start))

    def stop(self, id: str) -> bool:
        """Ask the job to end; whether it was running."""
        with self._errors():
            return self._client.stop_job(id)

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        """What Ray's client raises, as an InputError that says what to change."""
        try:
            yield
        except AuthenticationError as error:
            raise InputError(
                f"RAY_AUTH_TOKEN: the cluster at {self._server} needs the token that it was started with, in RAY_AUTH_TOKEN "
                f"or in a file at RAY_AUTH_TOKEN_PATH: {str(error).splitlines()[0]}"
            ) from error
        except OSError as error:  # of requests, too
            raise InputError(
                f"no Ray dashboard answers at {self._server} ({error}): is it forwarded (`ray dashboard`)?"
            ) from error
        except (RuntimeError, ValueError) as error:  # the server's own words; a working folder that is too large
            raise InputError(f"the cluster at {self._server} says: {error}") from error


def _submission(job: Any) -> Submission:
    return Submission(
        id=str(job.submission_id),
        state=str(job.status).lower(),
        command=job.entrypoint,
        message=job.message or "",
        exit_status=_exit_status(job),
        facts=job.metadata or {},
        start=_time(job.start_time),
        end=_time(job.end_time),
    )


def _exit_status(job: Any) -> int | None:
    """As a shell would report it; 1 for a job that was stopped or never started; None while it runs."""
    if not job.status.is_terminal():
        return None
    if job.status == JobStatus.SUCCEEDED:
        return 0
    code = job.driver_exit_code or 1
    return code if code > 0 else 128 - code


def _time(milliseconds: int | None) -> datetime | None:
    return datetime.fromtimestamp(milliseconds / 1000, UTC) if milliseconds else None
