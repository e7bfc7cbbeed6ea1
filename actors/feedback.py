"""The feedback role: the durable log, and snapshots of it where the fitting roles read them."""

from __future__ import annotations

from pathlib import Path

from causalrm_ray.data.log.snapshot import write_snapshot
from causalrm_ray.data.log.store import FeedbackLog


class FeedbackRole(FeedbackLog):
    """A FeedbackLog that also writes its snapshots."""

    def write_snapshot(self, path: Path, as_of: float | None) -> None:
        """Write the snapshot as of a time (None: all of it) to `path`, whole or not at all."""
        write_snapshot(self.snapshot(as_of), path)
