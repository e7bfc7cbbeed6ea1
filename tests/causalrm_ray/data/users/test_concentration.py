"""No user outweighs the rest: a bot's thousand upvotes leave its answers where they belong; thinning is even and repeats."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch

from causalrm_ray.data.collate import FeatureRows
from causalrm_ray.data.users.clusters import LEVELS, digest, split, who
from causalrm_ray.data.users.concentration import cap, keep, largest_share
from causalrm_ray.estimators.core.task import Observations
from causalrm_ray.estimators.core.training import FitSettings, predict
from causalrm_ray.estimators.nuisances.propensity import calibrate, cross_fit
from causalrm_ray.estimators.pipeline import fit_reward_models
from causalrm_ray.models.scorers.heads import FeatureScorer
from causalrm_ray.types import NoiseRates, PerUser

ROWS, UPVOTES = 4000, 1000


def ids(rows: int) -> np.ndarray:
    return digest("impression_id", [f"i{row}" for row in range(rows)])


def test_a_user_keeps_as_many_rows_with_feedback_as_allowed_and_as_large_a_part_without() -> None:
    rows = 30_000
    rng = np.random.default_rng(0)
    users = np.array([f"u{row % 300}" for row in range(rows)])
    observed = (rng.random(rows) < np.where(np.arange(rows) % 300 < 100, 0.7, 0.05)).astype(np.int8)
    kept = keep(digest("user", users.tolist()), ids(rows), observed, 20)
    silent = expected = variance = 0.0
    for user in np.unique(users):
        mine = users == user
        given, without = int(observed[mine].sum()), int((1 - observed[mine]).sum())
        assert observed[mine & kept].sum() == min(given, 20)
        part = min(1.0, 20 / max(given, 1))
        here = int((kept & mine & (observed == 0)).sum())
        assert abs(here - without * part) < 1
        silent, expected, variance = silent + here, expected + without * part, variance + 0.25 * (part < 1)
    assert abs(silent - expected) < 3 * variance**0.5  # rounding favours neither side
    assert kept[observed == 0].mean() < 1


def test_few_rows_are_kept_whole_and_unknown_users_are_nobodys() -> None:
    observed = np.array([1, 1, 1, 0, 1, 1])
    user = digest("user", ["a", "a", "a", "a", None, None])
    assert keep(user, ids(6), observed, 3).all()
    assert keep(user, ids(6), observed, 1).tolist()[4:] == [True, True]
    assert keep(np.zeros(6, dtype=np.uint64), ids(6), observed, 1).all()


def test_the_rows_that_a_user_keeps_stay_as_others_come() -> None:
    observed, user = np.ones(500, dtype=np.int8), digest("user", ["a"] * 500)
    early, late = keep(user[:200], ids(200), observed[:200], 30), keep(user, ids(500), observed, 30)
    assert not (late[:200] & ~early).any()


def test_the_limit_follows_the_median_user() -> None:
    votes = ["bot"] * 1000 + [f"u{row % 300}" for row in range(2400)]
    user, observed = digest("user", votes), np.ones(3400)
    assert cap("auto", user, observed) == 40
    raters = digest("user", [f"u{row % 5}" for row in range(5000)])
    assert cap("auto", raters, np.ones(5000)) == 5_000
    assert cap("auto", np.zeros(5, dtype=np.uint64), np.ones(5)) is None
    assert (cap(7, user, observed), cap(None, user, observed)) == (7, None)
    most = largest_share(user, observed)
    assert most is not None
    assert (most.row, most.rows, most.total, most.share) == (0, 1000, 3400, pytest.approx(1000 / 3400))


def ranks(per_user: PerUser, method: str) -> tuple[float, float]:
    """Mean rank in [0, 1] of the bot's answers by the fitted model, and by their true quality."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(ROWS, 6)).astype(np.float32)
    flooded = np.arange(ROWS) < UPVOTES  # a bot's; other users see answers of the kind too
    kind = flooded | (rng.random(ROWS) < 0.1)
    x[kind] += np.array([-1.0, 2.5, 0, 0, 0, 0], dtype=np.float32)
    quality = 1 / (1 + np.exp(-2 * x[:, 0] - x[:, 2]))
    liked = rng.random(ROWS) < quality
    observed = flooded | (rng.random(ROWS) < np.where(liked, 0.35, 0.2))
    label = flooded | (liked ^ (rng.random(ROWS) < 0.1))
    users = ["bot" if bot else f"u{rng.integers(300)}" for bot in flooded]
    names: dict[str, list] = {"user": users, "prompt": [str(row) for row in range(ROWS)], "conversation_id": [None] * ROWS}
    keys = {level: digest(level, names.get(level, names["prompt"])) for level in LEVELS}
    limit = cap(per_user, who(keys), observed)
    kept = np.ones(ROWS, dtype=bool) if limit is None else keep(who(keys), keys["impression_id"], observed, limit)
    sides = split({level: key[kept] for level, key in keys.items()}, observed[kept], label[kept])
    cluster = None if sides.cluster is None else torch.from_numpy(sides.cluster)
    log = Observations(torch.from_numpy(observed[kept]).float(), torch.from_numpy(label[kept]).float(), cluster)
    inputs, make = FeatureRows(torch.from_numpy(x[kept])), partial(FeatureScorer, 6, (32,))
    settings = FitSettings(40, 5e-3, 256, 5)
    raw, _ = cross_fit(make, inputs, log.o, settings, fold=torch.from_numpy(sides.fold))
    prob = calibrate(raw, log.o, 0.05, cluster=cluster).prob
    heldout = torch.from_numpy(np.flatnonzero(sides.heldout))
    fits = fit_reward_models(make, inputs, log, prob, (method,), settings, rates=NoiseRates(0.1, 0.1), heldout=heldout)
    logit = predict(fits.fits[method].scorer, FeatureRows(torch.from_numpy(x))).numpy()
    fitted, true = (values.argsort().argsort() / ROWS for values in (logit, quality))
    return float(fitted[flooded].mean()), float(true[flooded].mean())


@pytest.mark.parametrize("method", ["auto", "causalrm_dr", "naive"])
def test_a_bots_thousand_upvotes_do_not_lift_its_answers_above_the_median(method: str) -> None:
    rank, deserved = ranks("auto", method)
    assert deserved < 0.35
    assert rank < 0.47
    flooded, _ = ranks(None, method)
    assert flooded > 0.65
