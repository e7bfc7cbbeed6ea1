"""Files of a source: which ones a folder holds, how each is opened and unpacked, what its ending says.

path | folder | URL --files_of--> File ... --File.open--> unpacked bytes
"""

from __future__ import annotations

import bz2
import difflib
import gzip
import io
import lzma
import re
import shutil
import tempfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO, Any
from urllib.parse import unquote

import pyarrow as pa

from causalrm_ray.data.rows import SourceError

KINDS = {".jsonl": "json", ".ndjson": "json", ".json": "json", ".csv": "csv", ".tsv": "tsv", ".parquet": "parquet"}
PACKED = {".gz": b"\x1f\x8b", ".bz2": b"BZh", ".xz": b"\xfd7zXZ\x00", ".zst": b"\x28\xb5\x2f\xfd"}  # ending -> first bytes
ENDINGS = f"{', '.join(KINDS)}, each also with {', '.join(PACKED)}"
BUFFER = 1 << 20
FOREIGN = {  # first bytes of what cannot be read -> what it is and what to do
    b"PK\x03\x04": "a ZIP archive, as .xlsx files are too: unpack it, or export the sheet as CSV",
    b"PAR1": "Parquet: name it .parquet",
    b"\xff\xfe": "text in UTF-16: convert it with `iconv -f UTF-16 -t UTF-8`",
    b"\xfe\xff": "text in UTF-16: convert it with `iconv -f UTF-16 -t UTF-8`",
    b"<": "HTML or XML, often the page of a login or an error: download it again",
}
_SPARK = ("_SUCCESS", "_committed_", "_started_", "_metadata", "_common_metadata")  # hold no rows
_PAPERS = ("README", "LICENSE")
_NO_VALUE = "__HIVE_DEFAULT_PARTITION__"
FAULTS = (EOFError, OSError, ValueError, zlib.error, lzma.LZMAError, pa.ArrowException)


@dataclass(frozen=True)
class File:
    """One file. `where` is what reports call it; `system` is an fsspec file system, None for this machine's.

    `partition` are columns that folders above it name, as Spark writes them: key=value. `name` is the one whose ending counts,
    where that of the path does not.
    """

    where: str
    path: str
    system: Any = None
    partition: Mapping[str, str | None] = field(default_factory=dict)
    name: str = ""

    @property
    def _ending(self) -> str:
        return PurePosixPath(self.name or self.path).suffix.lower()

    @property
    def kind(self) -> str:
        """One of the values of KINDS. Raises SourceError for another ending."""
        found = kind_of_name(self.name or self.path)
        if found is None:
            raise SourceError(f"{self.where} must end in one of {ENDINGS}, got {self._ending!r}")
        return found

    def open(self) -> io.BufferedReader:
        """The unpacked bytes. Raises SourceError for what is packed otherwise than its ending says."""
        raw = self.open_as_is()
        head = raw.read(8)
        raw.seek(0)
        packed = next((name for name, magic in PACKED.items() if head.startswith(magic)), None)
        if self._ending in PACKED and head and packed != self._ending:
            raise SourceError(f"{self.where} must be packed as its ending {self._ending} says, got other first bytes: rename it")
        return io.BufferedReader(_unpacked(raw, packed), BUFFER) if packed else io.BufferedReader(raw, BUFFER)

    def open_seekable(self) -> IO[bytes] | str:
        """The unpacked bytes as a file that may be read anywhere, or its path: a temporary file where it is packed."""
        if self._ending not in PACKED:
            return self.path if self.system is None else self.open_as_is()
        with tempfile.NamedTemporaryFile() as whole, self.open() as stream:
            shutil.copyfileobj(stream, whole, BUFFER)
            whole.flush()
            return open(whole.name, "rb")  # its name may go: an open file stays

    def open_as_is(self) -> Any:
        """The bytes as they are stored."""
        return open(self.path, "rb", buffering=0) if self.system is None else self.system.open(self.path, "rb")


def _unpacked(raw: Any, packed: str) -> Any:
    if packed == ".zst":
        return pa.CompressedInputStream(pa.PythonFile(raw, mode="r"), "zstd")
    return {".gz": gzip.GzipFile, ".bz2": bz2.BZ2File, ".xz": lzma.LZMAFile}[packed](**{_file_argument(packed): raw})


def _file_argument(packed: str) -> str:
    return "fileobj" if packed == ".gz" else "filename"


@contextmanager
def readable(where: str, what: str) -> Iterator[None]:
    """Raise SourceError, which says that `where` must be `what`, for whatever its bytes or its storage raise."""
    try:
        yield
    except SourceError:
        raise
    except (EOFError, zlib.error, lzma.LZMAError) as error:
        raise SourceError(
            f"{where} must be a whole file, but its packed content ends early or is damaged: copy it again"
        ) from error
    except FileNotFoundError as error:
        raise SourceError(f"{where}: no such file or folder") from error
    except FAULTS as error:
        raise SourceError(f"{where} must be {what}: {without_urls(error)}") from error


def without_urls(error: Exception) -> str:
    """What an error says, without URLs: they may hold signatures and tokens."""
    return re.sub(r"\w+://[^\s'\"]+", "URL", str(error))


def kind_of_name(name: str) -> str | None:
    """One of the values of KINDS, by the ending that is left when one of PACKED is taken off; None for another."""
    path = PurePosixPath(name.lower())
    return KINDS.get(PurePosixPath(path.stem).suffix if path.suffix in PACKED else path.suffix)


def check_text(where: str, head: bytes) -> None:
    """Raise SourceError if a file of text begins like something else."""
    for magic, found in FOREIGN.items():
        if head.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(magic):
            raise SourceError(f"{where} must be JSON or CSV text, got {found}")


def local_files(path: Path) -> list[File]:
    """A file, or all files of a folder. Raises SourceError for what is not there, with the nearest name."""
    if path.is_dir():
        names = [str(file.relative_to(path).as_posix()) for file in path.rglob("*") if file.is_file()]
        return [File(str(path / name), str(path / name), None, partition(name)) for name in rows_in(str(path), names)]
    if not path.exists():
        raise SourceError(no_such_file(path))
    return [File(str(path), str(path))]


def no_such_file(path: Path) -> str:
    """A sentence that says so, with the nearest name or the first folder that is missing."""
    missing = path
    while not missing.parent.exists():
        missing = missing.parent
    if missing != path:
        return f"{path}: no such file or folder; the folder {missing} is missing"
    nearest = difflib.get_close_matches(path.name, [file.name for file in path.parent.iterdir()], n=1, cutoff=0.5)
    return f"{path}: no such file or folder" + (f"; did you mean {path.with_name(nearest[0])}?" if nearest else "")


def rows_in(folder: str, names: Sequence[str]) -> list[str]:
    """Those of the relative `names` that hold rows, sorted. Raises SourceError if one is of no kind that can be read.

    Left out: hidden files, what Spark writes beside its parts, README and LICENSE.
    """
    found, unknown = [], []
    for name in sorted(names):
        parts = PurePosixPath(name).parts
        if "_delta_log" in parts:
            raise SourceError(
                f"{folder} must be a folder of plain files, got a Delta table, whose files may hold deleted rows: export it"
            )
        if parts[-1].startswith((".", *_SPARK, *_PAPERS)) or any(part.startswith(".") for part in parts):
            continue
        strange = kind_of_name(name) is None or any(part.startswith("_") and "=" not in part for part in parts)
        (unknown if strange else found).append(name)
    if unknown:
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        raise SourceError(
            f"{folder} must hold only files of rows ({ENDINGS}), got {unknown[0]}{more}: move it out of the folder, or convert it"
        )
    if not found:
        raise SourceError(f"{folder} must hold files of rows ({ENDINGS}), got none")
    return found


def partition(name: str) -> dict[str, str | None]:
    """Columns of the key=value folders of a relative path."""
    pairs = [part.split("=", 1) for part in PurePosixPath(name).parts[:-1] if "=" in part]
    return {unquote(key): None if value == _NO_VALUE else unquote(value) for key, value in pairs}
