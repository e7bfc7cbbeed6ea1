"""The figures of a run, as summary.json holds them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from actors.reward.report import Refit, to_json
from actors.system import Roles
from causalrm_ray.config.train import Config, WorldConfig
from causalrm_ray.data.log.store import open_log
from causalrm_ray.estimators.diagnostics.advice import advise, verdict
from causalrm_ray.estimators.diagnostics.intervals import rate_ends
from causalrm_ray.rl.drift import drift_warnings
from jobs.support.oracle import Oracle
from jobs.support.prompts import PromptSource
from jobs.support.run_folder import Run


@dataclass(frozen=True)
class Start:
    """What is measured once, before the first step; every checkpoint keeps it.

    `shown` impressions filled the log; `fit` is the first fit's summary; `scores` are those of the starting policy's answers:
    the oracle's where it knows them, else the serving reward model's logits; `reward_model` is how the oracle judges the models.
    """

    shown: int
    fit: dict[str, Any]
    scores: list[float]
    reward_model: dict[str, Any] | None


def fit_summary(fit: Refit, world: WorldConfig | None = None) -> dict[str, Any]:
    """Results of a fit of propensity, noise rates and reward model, with the true rates for users of a known `world`."""
    truth = {} if world is None else dict(zip(("rho_01", "rho_10"), world.rho, strict=True))
    reward = fit.reward
    ends = rate_ends(reward.rates, reward.noise, reward.diagnostics.intervals)
    rates = {name: {**rate, "truth": truth.get(name)} for name, rate in ends.items()}
    found, propensity = to_json(fit.reward.diagnostics), to_json(fit.propensity)
    return {
        "noise_rates": rates,
        "propensity": propensity,
        "diagnostics": {
            **found,
            "propensity": {name: propensity[name] for name in ("clip", "clipped_share", "mean_weight", "curve")},
            "rates": rates,
            "verdict": verdict(found, bool(fit.reward.level)),
            "warnings": [
                *advise(found, propensity, rates, bool(fit.reward.level)),
                *(fit.reward.noise.warnings if fit.reward.noise else ()),
                *_level_doubts(fit),
            ],
        },
        "clean": _clean(fit),
        "reward_fit": {
            "heldout_risk": {name: method.heldout_risk for name, method in fit.reward.methods.items()},
            "best_epoch": {name: method.best_epoch for name, method in fit.reward.methods.items()},
            "seconds": fit.seconds,
            "train_seconds": fit.train_seconds,
            "folders": dict(fit.folders),
        },
    }


def with_drift(diagnostics: Mapping[str, Any], rows: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """A fit's diagnostics, with warnings about the policy's drift in the metrics since."""
    return {**diagnostics, "warnings": [*diagnostics["warnings"], *drift_warnings(rows)]}


def _clean(fit: Refit) -> dict[str, Any] | None:
    """How many judged rows the log holds, and what they said of each method's level; without ids, which may be forgotten."""
    if fit.clean is None:
        return None
    level = {name: to_json(report) for name, report in fit.reward.level.items()}
    return {"matched": fit.clean.matched, "unmatched": fit.clean.unmatched, "level": level}


def _level_doubts(fit: Refit) -> list[str]:
    """Warnings about judged rows, and about the level that they set of the model that serves."""
    level = fit.reward.level.get(fit.reward.diagnostics.method)
    return [*(fit.clean.warnings if fit.clean else ()), *(level.warnings if level else ())]


def promotion_metrics(refit: Refit) -> dict[str, float]:
    """Metrics of a refit."""
    return {
        "refit_promoted": float(refit.promotion.promoted),
        "promoted_version": float(refit.promotion.version),
        "propensity_ece": refit.propensity.ece,
        "propensity_ess_fraction": refit.propensity.ess_fraction,
    }


def judge_start(config: Config, roles: Roles, prompts: PromptSource, oracle: Oracle, fit: Refit, shown: int) -> Start:
    """Measure the starting policy on held-out prompts, and R2 and AUROC of each method's model on its fresh answers."""
    answers = roles.stream.sample(prompts.evaluation_requests())
    summary = fit_summary(fit, config.world if oracle.known else None)
    if not oracle.known:
        return Start(shown, summary, roles.score(answers).tolist(), None)
    seen = [done for done in answers if not done.is_blank]  # by users
    impressions = prompts.impressions(seen, prompts.clock(0))
    models: dict[str, Any] = {"method": config.reward.method, "answers": len(seen)}
    for name, folder in fit.folders.items():
        prefix = {"oracle": "oracle_trained_", config.reward.method: ""}.get(name, f"{name}_")
        judged = oracle.judge(roles.score(seen, config.run.path / folder), impressions)
        models |= {f"{prefix}{key}": value for key, value in judged.items()}
    return Start(shown, summary, oracle.scores(answers).tolist(), models)


def summarise(config: Config, run: Run, roles: Roles, prompts: PromptSource, oracle: Oracle, start: Start) -> dict[str, Any]:
    """summary.json after the last step: the start against the tuned policy."""
    rows = run.read_metrics(run.path)
    after = roles.stream.sample(prompts.evaluation_requests())
    tokens = sum(row["tokens"] for row in rows)
    last = rows[-1]
    summary = {
        "steps": len(rows),
        "generated_tokens": int(tokens),
        "tokens_per_s": tokens / sum(row["seconds"] for row in rows),
        "engines": roles.engines,
        **start.fit,
        "diagnostics": with_drift(start.fit["diagnostics"], rows),
        "policy_version": int(after[0].policy_version),
        "reward_version": int(last["reward_version"]),
        "logprob_mismatch": {
            "mean_abs": max(row["logprob_mismatch_mean_abs"] for row in rows),
            "max_abs": max(row["logprob_mismatch_max_abs"] for row in rows),
        },
        "weight_sync": {
            "bytes": int(last["sync_bytes"]),
            "seconds": float(np.median([row["sync_seconds"] for row in rows])),
            "checksum_ok": all(row["sync_checksum_ok"] == 1 for row in rows),
            "transport": roles.plan.transport,
        },
        "answers": [{"prompt": done.prompt.conversation.text, "response": done.response} for done in after[:6]],
    }
    if oracle.known:
        before, now = np.array(start.scores), oracle.scores(after)
        stderr = float(np.sqrt(before.var(ddof=1) / len(before) + now.var(ddof=1) / len(now)))
        summary["oracle_reward"] = {"before": float(before.mean()), "after": float(now.mean()), "stderr": stderr}
        summary["reward_model"] = start.reward_model
        shown = start.shown + int(sum(row["shown"] for row in rows))
        summary["feedback"] = oracle.audit(open_log(config), shown)
    else:
        first = run.path / start.fit["reward_fit"]["folders"][config.reward.method]  # the same model judges both
        now = roles.score(after, first)
        summary["model_reward"] = {"before": float(np.mean(start.scores)), "after": float(now.mean())}
    return summary
