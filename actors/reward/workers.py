"""What each Ray Train worker does in a reward fit: the same rows and seeds, its own slice of every batch, one folder.

spec: states of the snapshot -> fit_reward_models (heads) [-> distil into the backbone (DDP, this rank's shard)]
      -> the gate's risks -> rank 0: METHOD/ (heads on states, or Hugging Face folders), report.json
"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch
from ray.train.collective import broadcast_from_rank_zero
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from actors.cluster.environment import give_back_freed
from actors.reward.fit_spec import BATCH_SIZE, LOSS, FitSpec
from actors.reward.propensity_actor import read_propensities
from actors.reward.report import LogDiagnostics, MethodReport, RewardReport
from actors.reward.snapshot_rows import SnapshotRows, load_rows, read_clean_labels
from causalrm_ray.checkpoint import atomic_folder
from causalrm_ray.config.benchmark import HeadConfig
from causalrm_ray.data.collate import FeatureRows
from causalrm_ray.data.states.cache import StateCache
from causalrm_ray.estimators.core.frozen import distil
from causalrm_ray.estimators.core.task import FitTask, Nuisances
from causalrm_ray.estimators.core.training import FitSettings, Objective, Shard, predict
from causalrm_ray.estimators.diagnostics.diagnose import diagnose_fit
from causalrm_ray.estimators.diagnostics.groups import diagnose_groups, diagnose_signals
from causalrm_ray.estimators.diagnostics.selection_posterior import explained
from causalrm_ray.estimators.pipeline import RewardFits, fit_reward_models, heldout_objective
from causalrm_ray.losses.pointwise import LOSSES
from causalrm_ray.models.reward_model import SequenceScorer
from causalrm_ray.models.scorers.heads import FeatureScorer, centre_and_scale
from causalrm_ray.models.scorers.wrapped import Standardised, cautious
from causalrm_ray.models.states.scorer import is_head, load_scorer, read_head, save_head
from causalrm_ray.models.text import load_tokenizer
from causalrm_ray.types import NoiseRates

HEADS = HeadConfig()  # of methods that have no sizes and schedules of their own


def work(queue: Any) -> None:
    """Do the fits of `queue` (an actor, `fit_spec.FitQueue`) with the other workers, one after another, until it closes."""
    context = ray.train.get_context()
    shard = Shard(context.get_world_rank(), context.get_world_size(), ray.train.torch.prepare_model)
    device = ray.train.torch.get_device()
    while (taken := broadcast_from_rank_zero(None if shard.rank else ray.get(queue.take.remote()))) is not None:
        number, spec, folder = taken
        if shard.rank:
            fit_into(folder, spec, shard, device)
            give_back_freed()
            continue
        with atomic_folder(folder) as temporary:
            seconds = fit_into(temporary, spec, shard, device)
        give_back_freed()
        ray.get(queue.done.remote(number, seconds))


def fit_into(folder: Path, spec: FitSpec, shard: Shard, device: torch.device) -> float:
    """Fit as `spec` says; rank 0 writes models and report to `folder`. Returns the seconds that it took."""
    torch.set_num_threads(1)  # sums in one order, and no workers fighting for a core
    started = time.perf_counter()
    tokenizer = load_tokenizer(spec.backbone.model)
    log = load_rows(spec.snapshot, StateCache(spec.cache), spec.max_length, spec.per_user)
    states = log.states(spec.backbone.states)
    centre, scale = centre_and_scale(states)
    states.sub_(centre).div_(scale)  # in place: they may be many
    propensity = read_propensities(spec.propensities)
    fits = _fit(spec, states, log, propensity, shard)
    gate = heldout_objective(
        log.observations, Nuisances(propensity, fits.rates, fits.imputation), LOSSES[LOSS], fits.heldout, fits.selection
    )
    logit = predict(fits.fits[spec.config.method].scorer, FeatureRows(states), fits.heldout)
    if spec.config.caution:
        fits.risks[spec.config.method] = _risk(gate, fits.heldout, logit)
    if spec.config.tune == "full":
        fits, logit = _distilled(fits, spec, states, log, tokenizer, gate, shard, device)
    serving = _serving_risk(spec, log, gate, device)
    if shard.rank == 0:
        for method, fitted in fits.fits.items():
            if isinstance(fitted.scorer, SequenceScorer):
                fitted.scorer.save_pretrained(folder / method, tokenizer)
            else:
                save_head(folder / method, Standardised(fitted.scorer, centre, scale), spec.backbone, tokenizer)
        report(fits, spec, log, propensity, logit, serving).write(folder)
    return time.perf_counter() - started


def report(
    fits: RewardFits, spec: FitSpec, log: SnapshotRows, propensity: Tensor, logit: Tensor, serving_risk: float | None
) -> RewardReport:
    """The report of a fit, with the diagnostics of the model that may serve, by its `logit` of the held-out rows; the same fit
    gives the same figures."""
    method, observations = spec.config.method, log.observations
    found = diagnose_fit(fits, method, observations, propensity, logit, LOSS, spec.seed, log.traits.number)
    explanation = explained(fits, method)
    groups = {
        name: diagnose_groups(fits.ranking, explanation, observations, groups, spec.seed)
        for name, groups in (("traits", log.traits), ("lengths", log.lengths))
    }
    signals = diagnose_signals(fits.ranking, log.signals, spec.seed, observations.cluster)
    return RewardReport(
        methods={
            name: MethodReport(fits.risks[name], fitted.report.best.number, dict(fitted.figures), tuple(fitted.report.epochs))
            for name, fitted in fits.fits.items()
        },
        diagnostics=LogDiagnostics(**vars(found), groups=groups, signals=signals),
        rates=fits.rates,
        noise=fits.noise,
        heldout_rows=len(fits.heldout),
        serving_risk=serving_risk,
        serving_version=spec.serving_version,
        level=fits.level,
    )


def _fit(spec: FitSpec, states: Tensor, log: SnapshotRows, propensity: Tensor, shard: Shard) -> RewardFits:
    """Heads on standardised `states` [N, D], cautious where that is asked for."""
    config = spec.config
    fits = fit_reward_models(
        lambda: FeatureScorer(states.shape[1], HEADS.widths, HEADS.dropout),
        FeatureRows(states),
        log.observations,
        propensity,
        spec.methods,
        FitSettings(HEADS.epochs, HEADS.lr, HEADS.batch_size, HEADS.patience, HEADS.weight_decay, spec.seed),
        loss=LOSS,
        rates=None if config.rho is None else NoiseRates(*config.rho),
        noise_rates=config.noise_rates,
        clean_labels=None if spec.clean_labels is None else read_clean_labels(spec.clean_labels)[log.kept],
        judged=None if spec.judged is None else read_clean_labels(spec.judged)[log.kept],
        heldout=log.heldout,
        strata=log.traits.number,
        ranked=True,
        states=True,
        shard=shard,
    )
    if not config.caution:
        return fits
    served = fits.fits[config.method]
    return replace(fits, fits={**fits.fits, config.method: replace(served, scorer=cautious(served.scorer, config.caution))})


def _distilled(
    fits: RewardFits,
    spec: FitSpec,
    states: Tensor,
    log: SnapshotRows,
    tokenizer: PreTrainedTokenizerBase,
    gate: Objective,
    shard: Shard,
    device: torch.device,
) -> tuple[RewardFits, Tensor]:
    """The same fits by whole models that learned what the heads say, with their held-out risks; and the held-out logits of the
    one that may serve. It goes on from the one that serves: it learns from heads only, which passes on no label."""
    rows, config = log.token_rows(tokenizer.pad_token_id), spec.config
    task = FitTask(
        lambda: SequenceScorer.from_pretrained(spec.backbone.model).to(device),
        rows,
        log.observations,
        Nuisances(),
        _without(len(log), fits.heldout),
        fits.heldout,
        FitSettings(config.epochs, config.lr, BATCH_SIZE, seed=spec.seed),
        LOSSES[LOSS],
        shard,
    )
    students, risks, served = {}, {}, torch.empty(0)
    for name, fitted in fits.fits.items():
        warm = name == config.method and spec.serving is not None and not is_head(spec.serving)
        start = SequenceScorer.from_pretrained(spec.serving).to(device) if warm and spec.serving else None
        students[name] = distil(task, fitted, states, start)
        logit = predict(students[name].scorer, rows, fits.heldout, shard=shard)
        risks[name] = _risk(gate, fits.heldout, logit)
        served = logit if name == config.method else served
    return replace(fits, fits=students, risks=risks), served


def _serving_risk(spec: FitSpec, log: SnapshotRows, gate: Objective, device: torch.device) -> float | None:
    """Held-out risk of the model that serves; None where none does."""
    if spec.serving is None:
        return None
    found, head = read_head(Path(spec.serving)) if is_head(spec.serving) else (None, nn.Identity())
    if found and (found.digest, found.dtype) == (spec.backbone.digest, spec.backbone.dtype):
        logit = predict(head, FeatureRows(log.states(found.states, gate.rows)))
    else:  # a whole model, or heads on another backbone
        logit = load_scorer(spec.serving, str(device)).score(log.rows(gate.rows))
    return float(gate.risk(logit, gate.rows).double().mean())


def _risk(gate: Objective, heldout: Tensor, logit: Tensor) -> float:
    """The gate's risk of held-out logits [H], of which it reads those with feedback."""
    return float(gate.risk(logit[torch.isin(heldout, gate.rows)], gate.rows).double().mean())


def _without(rows: int, out: Tensor) -> Tensor:
    everyone = torch.arange(rows)
    return everyone[~torch.isin(everyone, out)]
