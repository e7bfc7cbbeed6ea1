"""A disk that takes no more: each library that we write files with meets it in its own words, and all are recognised."""

from __future__ import annotations

import resource
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors.torch import save_file

from causalrm_ray.checkpoint import atomic_folder, write_json
from causalrm_ray.config.base import RunFolder
from causalrm_ray.data.parquet import write_parquet
from causalrm_ray.errors import InputError
from jobs.support.errors import naming_full_disks

LIMIT = 64 << 10  # bytes of a file: the kernel refuses more to this process, as a quota would
NUMBERS = np.random.default_rng(0).integers(256, size=16 * LIMIT, dtype=np.uint8)  # which nothing can compress


@pytest.fixture
def limit() -> Iterator[None]:
    """No file of this process may grow past LIMIT."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


def tensors(path: Path) -> None:
    save_file({"weight": torch.from_numpy(NUMBERS)}, path)


def archive(path: Path) -> None:
    torch.save({"weight": torch.from_numpy(NUMBERS)}, path)


def table(path: Path) -> None:
    write_parquet(pa.table({"number": NUMBERS}), path)


def json(path: Path) -> None:
    write_json(path, NUMBERS.tolist())


@pytest.mark.usefixtures("limit")
@pytest.mark.parametrize("write", [tensors, archive, table, json])
def test_a_full_disk_is_reported_as_such_and_leaves_nothing_half_written(write: Callable[[Path], None], tmp_path: Path) -> None:
    run = RunFolder(dir=tmp_path, name="run")
    named = pytest.raises(InputError, match=f"no room to write, most likely under {run.path}: ")
    with named, naming_full_disks(run), atomic_folder(run.path / "step-2") as folder:
        write(folder / "file")
    assert list(run.path.iterdir()) == []


@pytest.mark.parametrize("error", [FileNotFoundError(2, "No such file or directory"), RuntimeError("loss is not finite")])
def test_other_errors_are_not_taken_for_it(error: Exception, tmp_path: Path) -> None:
    with pytest.raises(type(error), match=str(error.args[-1])), naming_full_disks(RunFolder(dir=tmp_path)):
        raise error
