"""Rows that depend on one another, as those of one user do, and the sides of a split on which they stay together.

(user, conversation, prompt, impression) of each row --digest--> keys [N] each --split--> Split: sides, clusters
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from causalrm_ray.errors import InputError

# What makes rows depend on one another, by column, from the widest: a row that lacks one is split by the next.
LEVELS = ("user", "conversation_id", "prompt", "impression_id")
# Digits of a cluster's digest, from the lowest: of 5, whether reward fits hold it out; of 10, whether it decides when a
# propensity model stops; of 2, its fold otherwise.
HELD_OUT_ONE_IN, STOPS_ONE_IN, FOLDS = 5, 10, 2
FEWEST = 50  # clusters with feedback that a split needs: with fewer, chance decides what a side holds
SIDE = (0.05, 0.5)  # share of the feedback that may be held out


@dataclass(frozen=True, eq=False)
class Split:
    """N rows by what they depend on: `cluster` [N] (None: every row is one of its own), of the level `by` in LEVELS.

    `heldout` [N] is the mask of rows that reward fits never train on, about a fifth of the clusters. `fold` [N] is the propensity
    model that never trains on a row, 0 or 1, or that none does, -1. `warnings` are sentences.
    """

    cluster: np.ndarray | None
    heldout: np.ndarray
    fold: np.ndarray
    by: str
    warnings: tuple[str, ...]


def digest(column: str, values: Iterable[str | None]) -> np.ndarray:
    """A hash in [1, 2^64) of each value of a column, 0 where it is None: 8 bytes a row, whatever its text."""
    salt = f"{column}\0".encode()
    hashes = (
        0 if value is None else int.from_bytes(hashlib.blake2b(salt + value.encode(), digest_size=8).digest(), "little") or 1
        for value in values
    )
    return np.fromiter(hashes, dtype=np.uint64)


def mixed(key: np.ndarray, other: np.ndarray | int = 0) -> np.ndarray:
    """A further hash [N] of digests, or of pairs of them: splitmix64."""
    value = key + np.asarray(other).astype(np.uint64) * np.uint64(0xD1342543DE82EF95) + np.uint64(0x9E3779B97F4A7C15)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def who(keys: Mapping[str, np.ndarray]) -> np.ndarray:
    """The user [N] of each row; without one that of its conversation, else the conversation; 0 where neither is known."""
    user, conversation = keys["user"], keys["conversation_id"]
    named = (user != 0) & (conversation != 0)
    known, first = np.unique(conversation[named], return_index=True)
    place = np.searchsorted(known, conversation).clip(max=max(len(known) - 1, 0))
    of_conversation = conversation
    if len(known):
        of_conversation = np.where(known[place] == conversation, user[named][first][place], conversation)
    return np.where(user != 0, user, of_conversation)


def split(keys: Mapping[str, np.ndarray], observed: np.ndarray, label: np.ndarray) -> Split:
    """Sides of N rows by a hash of what they depend on, so that a cluster stays on its side in every later log.

    `keys` [N] are digests by LEVELS. Rows are split by user; a row without one by its conversation, and without this by its
    prompt. Where fewer than FEWEST of these gave feedback, or one of them gave so much that a side has nearly all or none of
    it, the next level splits all rows, and a warning says so. `label` [N] is read only where `observed` [N] is 1. Raises
    InputError where not even single impressions can be split.
    """
    warnings: list[str] = []
    levels = [level for level in LEVELS if keys[level].any()]
    for place, level in enumerate(levels):
        cluster = _coalesce(keys, levels[place:])
        heldout, rest = cluster % HELD_OUT_ONE_IN == 0, cluster // HELD_OUT_ONE_IN
        fold = np.where(rest % STOPS_ONE_IN == 0, -1, (rest // STOPS_ONE_IN % FOLDS).astype(np.int64))
        last = level == LEVELS[-1]
        fault = _fault(cluster, heldout, fold, observed, label, last)
        if fault is None:
            single = last or len(np.unique(cluster)) == len(cluster)
            return Split(None if single else cluster.view(np.int64), heldout, fold, level, tuple(warnings))
        if last:
            raise InputError(f"the log must hold enough impressions to split them into training and test rows, got {fault}")
        warnings.append(
            f"Training and held-out rows are not split by {level} ({fault}), but by {levels[place + 1]}: what one {level} "
            f"says may be on both sides, and held-out figures too good. Collect feedback from more of them."
        )
    raise InputError("the log must hold impressions with an id, got none")


def _coalesce(keys: Mapping[str, np.ndarray], levels: list[str]) -> np.ndarray:
    """The first key [N] among `levels` that a row has."""
    found = who(keys) if levels[0] == "user" else keys[levels[0]]
    for level in levels[1:]:
        found = np.where(found != 0, found, keys[level])
    return found


def _fault(
    cluster: np.ndarray, heldout: np.ndarray, fold: np.ndarray, observed: np.ndarray, label: np.ndarray, last: bool
) -> str | None:
    """Why a split is none; of single impressions less is asked."""
    if heldout.all() or not heldout.any() or set(np.unique(fold).tolist()) != {-1, 0, 1}:
        return f"{len(np.unique(cluster))} over {len(cluster)} rows"
    if last:
        return None
    seen = observed == 1
    givers = len(np.unique(cluster[seen]))
    if givers < FEWEST:
        return f"{givers} gave feedback, fewer than {FEWEST}"
    share = heldout[seen].mean()
    if not SIDE[0] <= share <= SIDE[1]:
        return f"{share:.0%} of the feedback would be held out, as a few gave most of it"
    for side, rows in (("held-out", seen & heldout), ("training", seen & ~heldout)):
        if len(np.unique(label[rows])) < 2:
            return f"all feedback of the {side} ones says the same"
    return None
