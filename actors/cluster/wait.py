"""Waiting for roles and tasks, with a time-out that names who has not answered, and an error that names who died."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import ray
from ray.exceptions import (
    ActorUnschedulableError,
    GetTimeoutError,
    ObjectLostError,
    RayActorError,
    RayTaskError,
    TaskUnschedulableError,
    WorkerCrashedError,
)

from actors.cluster.in_process import in_process
from actors.cluster.telemetry import event, record
from actors.errors import EngineDeadError, RoleDiedError, RoleTimeoutError, StrandedError, WrongWeightsError
from causalrm_ray.errors import InputError

LABELS: dict[str, str] = {}  # actor id (hex) -> role, of all that this process placed (see place)


def resolve(refs: Any, phase: str, timeout_s: float) -> Any:
    """The value (or list of values) behind `refs`.

    Raises RoleTimeoutError or RoleDiedError that names the phase and the roles that have not answered, or died, or whose engine
    did. A role's own error passes, an InputError in its plain form.
    """
    if in_process():
        return refs
    try:
        return ray.get(refs, timeout=timeout_s)
    except GetTimeoutError as error:
        raise _late(phase, _pending(refs), timeout_s) from error
    except ObjectLostError as error:  # of an argument, too: then it is also a RayTaskError
        raise _death([], f"{phase}: what a role had made was lost with its node: {error}") from error
    except (ActorUnschedulableError, TaskUnschedulableError) as error:  # its node died before it could start there
        raise _death(_known(refs), f"{phase}: {error}") from error
    except (RayActorError, WorkerCrashedError) as error:
        role = LABELS.get(getattr(error, "actor_id", None) or "")
        raise _death([role] if role else [], f"{phase}: the process of {role or 'a role'} died: {error}") from error
    except RayTaskError as error:
        if isinstance(error.cause, InputError):
            raise error.cause from None
        if isinstance(error.cause, EngineDeadError) and not isinstance(error.cause, WrongWeightsError):
            raise _death(_known(refs), f"{phase}: {error.cause}") from error
        raise


def resolve_all(refs: Mapping[str, Any], phase: str, timeout_s: float) -> dict[str, Any]:
    """The value behind each of `refs`, by the name of its role, within `timeout_s` for all.

    Where one role fails, those that work with it fail too, so all are waited for: RoleDiedError if a process or an engine died,
    RuntimeError if a role failed otherwise, RoleTimeoutError if they only did not answer, waited in vain or lost their peers;
    each names all, the dead first.
    """
    until = time.monotonic() + timeout_s
    found: dict[str, Any] = {}
    died, failed, late = {}, {}, {}
    first: Exception | None = None
    for name, ref in refs.items():
        try:
            found[name] = resolve(ref, f"{phase} ({name})", max(0.0, until - time.monotonic()))
        except (RoleDiedError, RoleTimeoutError, RayTaskError) as error:
            first = first or error
            cause = getattr(error, "cause", None)
            if isinstance(error, RoleDiedError):
                stranded = isinstance(getattr(error.__cause__, "cause", None), StrandedError)
                (late if stranded else died)[error.roles[0] if error.roles else name] = str(error)
            elif isinstance(error, RayTaskError):
                lost_peers = isinstance(cause, ConnectionError | TimeoutError)
                (late if lost_peers else failed)[name] = f"{phase} ({name}): {type(cause).__name__}: {cause}"
            else:
                late[name] = str(error)
    unusable = {**died, **failed, **late}
    message = "\n".join(unusable.values())
    if died:
        raise RoleDiedError(message, [*died, *(name for name in refs if name in unusable and name not in died)]) from first
    if unusable:
        raise (RuntimeError if failed else RoleTimeoutError)(message) from first
    return found


def stream(calls: Mapping[str, Any], phase: str, timeout_s: float) -> Iterator[tuple[str, Any]]:
    """(name of the call, item) of several streaming calls, as each item becomes ready; within one call in its own order."""
    if in_process():
        yield from ((name, item) for name, items in calls.items() for item in items)
        return
    names = {generator: name for name, generator in calls.items()}
    waiting: list[Any] = list(names)
    while waiting:
        generator, waiting = _next_ready(waiting, names, phase, timeout_s)
        reference = next(generator, None)
        if reference is not None:
            name = names[generator]
            yield name, resolve(reference, f"{phase} ({name})", timeout_s)
            waiting = [*waiting, generator]


def _pending(refs: Any) -> list[str]:
    """The roles behind those of `refs` that are not there yet."""
    distinct = list(dict.fromkeys(refs if isinstance(refs, list) else [refs]))
    _, pending = ray.wait(distinct, num_returns=len(distinct), timeout=0)
    return list(dict.fromkeys(map(_label, pending)))


def _known(refs: Any) -> list[str]:
    """The role behind a single reference; Ray does not say which one of a list failed."""
    return [] if isinstance(refs, list) else [_label(refs)]


def _death(roles: Sequence[str], message: str) -> RoleDiedError:
    return RoleDiedError(_recorded(roles or ["a role"], message), roles)


def _label(ref: Any) -> str:
    """The role whose method is behind a reference."""
    return LABELS.get(ref.task_id().actor_id().hex(), "a task")


def _late(phase: str, roles: Sequence[str], timeout_s: float) -> Exception:
    shown = ", ".join(roles[:8]) + (f" and {len(roles) - 8} more" if len(roles) > 8 else "")
    return RoleTimeoutError(_recorded(roles, f"{phase}: no answer from {shown} within cluster.timeout_s={timeout_s:g} s"))


def _recorded(roles: Sequence[str], message: str) -> str:
    """The message of a failure, which is also recorded for each role."""
    for role in roles:
        record("failures", role, 1)
        event("failure", role, logging.ERROR, error=message)
    return message


def run_tasks(
    function: Callable[..., Any], calls: Mapping[str, Any], shared: Any, phase: str, timeout_s: float
) -> Iterator[tuple[str, Any]]:
    """(name of the call, function(argument, shared)) of every call, as each ends; as many run at once as the cluster has CPUs.

    `shared` is sent to each node once. What a task raises is raised here, as by `resolve`.
    """
    task, sent = ray.remote(function).options(num_cpus=1), ray.put(shared)
    names = {task.remote(argument, sent): name for name, argument in calls.items()}
    waiting = list(names)
    while waiting:
        ready, waiting = _next_ready(waiting, names, phase, timeout_s)
        yield names[ready], resolve(ready, f"{phase} ({names[ready]})", timeout_s)


def _next_ready(waiting: list[Any], names: Mapping[Any, str], phase: str, timeout_s: float) -> tuple[Any, list[Any]]:
    """The first of `waiting` that is ready, and the others."""
    ready, others = ray.wait(waiting, num_returns=1, timeout=timeout_s)
    if not ready:
        raise _late(phase, [names[ref] for ref in waiting], timeout_s)
    return ready[0], others
