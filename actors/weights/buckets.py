"""How weights are cut for a broadcast: memory is planned by these figures before torch is loaded."""

from __future__ import annotations

BUCKET_BYTES = 256 * 2**20
BUCKETS = 2  # of a process at a time: one travels while the other is packed or loaded
