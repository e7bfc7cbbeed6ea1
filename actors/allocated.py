"""Where a plan puts each role, in the GPUs that are reserved for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from actors.cluster.place import Bundle, Placement
from actors.placement_plan import Plan


@dataclass(frozen=True, slots=True)
class Allocated:
    """A plan, and its placement group (None: no GPU)."""

    plan: Plan
    group: Any

    @property
    def on_gpu(self) -> bool:
        return bool(self.plan.bundles)

    def bundle(self, role: str) -> Bundle | None:
        index = self.plan.allocations[role].bundle
        return (self.group, index) if self.group and index is not None else None

    def placement(self, role: str, **options: Any) -> Placement:
        return Placement(role, gpus=self.plan.allocations[role].gpus, bundle=self.bundle(role), **options)
