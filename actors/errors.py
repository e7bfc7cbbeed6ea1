"""Errors of roles and engines; all can be pickled, since they cross processes."""

from __future__ import annotations

from collections.abc import Sequence


class RoleDiedError(RuntimeError):
    """A role's process ended, or its node; the message says in which phase. `roles` are the labels, where known, of those that
    cannot be used any more, the dead first."""

    def __init__(self, message: str, roles: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.roles = tuple(roles)


class RoleTimeoutError(TimeoutError):
    """A role did not answer in time; the message names the role and the phase."""


class EngineDeadError(RuntimeError):
    """The engine failed earlier and serves no more; `__cause__` holds what killed it where it happened in this process."""


class StrandedError(EngineDeadError):
    """It is dead because another process, which it waited for, did not answer."""


class WrongWeightsError(EngineDeadError):
    """It is dead because of the weights that it was given: another one would fail, too."""


class LostPeerError(ConnectionError):
    """A member of the group ended, failed or came too late; the message says in which phase."""
