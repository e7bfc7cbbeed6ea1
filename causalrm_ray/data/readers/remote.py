"""Files behind a URL: s3://, gs://, hf://, https:// and whatever else fsspec knows."""

from __future__ import annotations

import tempfile
from typing import IO, Any
from urllib.parse import urlsplit, urlunsplit

import fsspec

from causalrm_ray.data.readers.files import File, partition, rows_in, without_urls
from causalrm_ray.data.rows import SourceError

EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}  # scheme -> the extra that reads it


class _Downloaded:
    """A file system whose files are fetched whole and once, before they are read: a web server may not serve parts of them."""

    def __init__(self, system: Any) -> None:
        self._system = system
        self._fetched: dict[str, Any] = {}  # temporary files, gone with this object

    def open(self, path: str, mode: str) -> IO[bytes]:
        if path not in self._fetched:
            whole = tempfile.NamedTemporaryFile()  # noqa: SIM115 - open as long as this object
            try:
                self._system.get_file(path, whole.name)
            except FileNotFoundError:
                raise
            except Exception as error:  # of the client of whatever protocol
                raise OSError(f"{type(error).__name__}: {without_urls(error)}") from error
            self._fetched[path] = whole
        return open(self._fetched[path].name, mode, buffering=0)


def remote_files(url: str) -> list[File]:
    """The file at a URL, or all files below it. Raises SourceError that names the URL without its secrets."""
    shown, scheme = without_secrets(url), url.split("://", 1)[0]
    web = scheme in ("http", "https")
    try:
        system, path = fsspec.url_to_fs(url)
        names = [] if web or not system.isdir(path) else [name.removeprefix(path).strip("/") for name in system.find(path)]
        if not names and not web and not system.exists(path):
            raise SourceError(f"{shown}: no such file or folder")
    except ImportError as error:
        extra = EXTRAS.get(scheme)
        what = f"pip install 'causalrm-ray[{extra}]'" if extra else str(error)
        raise SourceError(f"{shown} must be readable, but a package for {scheme}:// is missing: {what}") from error
    except SourceError:
        raise
    except Exception as error:  # each storage has errors of its own, for a wrong key, a wrong host, a wrong name
        raise SourceError(
            f"{shown} must be readable with the rights of this process: {type(error).__name__}: {without_urls(error)}"
        ) from error
    if names:
        return [File(f"{shown.rstrip('/')}/{name}", f"{path}/{name}", system, partition(name)) for name in rows_in(shown, names)]
    return [File(shown, path, _Downloaded(system) if web else system, name=urlsplit(url).path)]


def without_secrets(url: str) -> str:
    """A URL without user, password, and what follows a question mark: signatures and tokens."""
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))
