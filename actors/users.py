"""The users role: simulated users who react to what they are shown."""

from __future__ import annotations

from collections.abc import Sequence

from causalrm_ray.types import FeedbackEvent, Impression
from causalrm_ray.world.users import SimulatedUsers


class UsersRole(SimulatedUsers):
    """SimulatedUsers who react to a whole micro-batch."""

    def react_all(self, impressions: Sequence[Impression]) -> list[FeedbackEvent]:
        """What the users do about `impressions`, in their order."""
        return [event for impression in impressions for event in self.react(impression)]
