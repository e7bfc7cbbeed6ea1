"""How much of a log's feedback comes from one user or lies on one answer, and how no user outweighs the rest.

keys [N] of data.users.clusters, o [N] --cap, keep--> rows that a fit reads;  --largest_share--> who gave most, and how much
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from causalrm_ray.data.users.clusters import mixed
from causalrm_ray.types import PerUser

HEAVY = 0.05  # share of the feedback of one user, or on one answer, that a warning names
TIMES, LEAST = 5, 20  # by "auto", the times that a user may count for what the median user gave, and rows that all may


@dataclass(frozen=True)
class Share:
    """The most feedback of one: `row` is the first of its rows with feedback, `rows` are those of `total` with feedback."""

    row: int
    rows: int
    total: int

    @property
    def share(self) -> float:
        """Of all feedback."""
        return self.rows / self.total if self.total else 0.0


def largest_share(key: np.ndarray, observed: np.ndarray) -> Share | None:
    """Whose feedback is most among the keys [N]; a key of 0 is unknown, and is nobody's. None without any."""
    seen = np.flatnonzero((observed == 1) & (key != 0))
    if len(seen) == 0:
        return None
    _, first, count = np.unique(key[seen], return_index=True, return_counts=True)
    most = int(count.argmax())
    return Share(int(seen[first[most]]), int(count[most]), int((observed == 1).sum()))


def cap(per_user: PerUser, user: np.ndarray, observed: np.ndarray) -> int | None:
    """Rows with feedback that a user counts for at most; None: no limit.

    "auto" is TIMES the median number of those users who gave any, and LEAST at least: where all give much, as hired raters do,
    all count; a bot does not move the median. `user` [N] is a digest, 0 where it is unknown.
    """
    if per_user != "auto":
        return per_user
    _, given = np.unique(user[(observed == 1) & (user != 0)], return_counts=True)
    return max(LEAST, int(TIMES * np.median(given))) if len(given) else None


def keep(user: np.ndarray, row: np.ndarray, observed: np.ndarray, per_user: int) -> np.ndarray:
    """Mask [N] of the rows that a fit reads if no user is to count for more than `per_user` >= 1 rows with feedback.

    The rule is that each row of a user with n rows with feedback weighs min(1, c / n), whether it has feedback or not: then
    P(o = 1 | x) and P(r | x, o = 1) of each user stay what they are, and only the share of users in D changes. Whoever drops the
    rows with feedback alone makes these users look silent. A weight of c / n is made by keeping so many: the c rows with feedback
    that are lowest by a hash of the `row` [N], and as large a part of those without (rounded up or down by a hash of the user, so
    that it is right in expectation). What has no weight in one estimator has none in any: losses, propensities, rates, intervals.
    `user` [N] is a digest, 0 where it is unknown: such rows are all kept.
    """
    seen = observed == 1
    known = np.flatnonzero(user != 0)
    users, place = np.unique(user[known], return_inverse=True)
    given = np.bincount(place[seen[known]], minlength=len(users))
    silent = np.bincount(place[~seen[known]], minlength=len(users))
    part = np.minimum(1.0, per_user / np.maximum(given, 1))
    rounding = (mixed(users) >> np.uint64(11)).astype(np.float64) / 2**53
    quota = np.stack([np.floor(silent * part + np.where(part < 1, rounding, 0)).astype(np.int64), np.minimum(given, per_user)])
    over = part[place] < 1
    kept = np.ones(len(user), dtype=bool)
    rows, group = known[over], place[over] * 2 + seen[known[over]]
    order = np.lexsort((mixed(row[rows]), group))
    ranked = group[order]
    start = np.flatnonzero(np.r_[True, ranked[1:] != ranked[:-1]]) if len(ranked) else np.zeros(0, dtype=np.int64)
    rank = np.arange(len(ranked)) - np.repeat(start, np.diff(np.r_[start, len(ranked)]))
    kept[rows[order]] = rank < quota[ranked % 2, ranked // 2]
    return kept
