"""What each Ray Train worker does in a reward fit: the same rows and seeds, its own slice of every batch, one folder.

spec: snapshot -> token rows -> fit_reward_models (DDP, this rank's shard) -> rank 0: METHOD/ (Hugging Face folders), report.json
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, cast

import ray
import ray.train
import ray.train.torch
import torch
from ray.train.collective import broadcast_from_rank_zero
from torch import Tensor

from actors.cluster.environment import give_back_freed
from actors.reward.fit_spec import BATCH_SIZE, LOSS, FitSpec
from actors.reward.propensity_actor import read_propensities
from actors.reward.report import LogDiagnostics, MethodReport, RewardReport
from actors.reward.snapshot_rows import SnapshotRows, load_rows, read_clean_labels
from causalrm_ray.checkpoint import atomic_folder
from causalrm_ray.estimators.core.frozen import frozen_states
from causalrm_ray.estimators.core.training import FitSettings, Inputs, Shard, predict
from causalrm_ray.estimators.diagnostics.diagnose import diagnose_fit
from causalrm_ray.estimators.diagnostics.groups import diagnose_groups, diagnose_signals
from causalrm_ray.estimators.diagnostics.selection_posterior import explained
from causalrm_ray.estimators.pipeline import RewardFits, fit_reward_models
from causalrm_ray.models.reward_model import SequenceScorer
from causalrm_ray.models.text import load_tokenizer
from causalrm_ray.types import NoiseRates


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
    tokenizer = load_tokenizer(spec.backbone)
    log = load_rows(spec.snapshot, tokenizer, spec.max_length, spec.per_user, spec.truncation)
    inputs = log.token_rows
    propensity = read_propensities(spec.propensities)
    fits = _fit(spec, inputs, log, propensity, shard, device)
    if shard.rank == 0:
        for method, fitted in fits.fits.items():
            cast(SequenceScorer, fitted.scorer).save_pretrained(folder / method, tokenizer)
        report(fits, spec, inputs, log, propensity).write(folder)
    return time.perf_counter() - started


def report(fits: RewardFits, spec: FitSpec, inputs: Inputs, log: SnapshotRows, propensity: Tensor) -> RewardReport:
    """The report of a fit, with the diagnostics of the model that may serve; the same fit gives the same figures."""
    method, observations = spec.config.method, log.observations
    logit = predict(fits.fits[method].scorer, inputs, fits.heldout)
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
        serving_risk=fits.serving_risk,
        serving_version=spec.serving_version,
        level=fits.level,
    )


def _fit(spec: FitSpec, inputs: Inputs, log: SnapshotRows, propensity: Tensor, shard: Shard, device: torch.device) -> RewardFits:
    config = spec.config
    # States of the backbone as it came: those of the propensity model have seen whose feedback is to be explained.
    states = frozen_states(SequenceScorer.from_pretrained(spec.backbone).to(device), inputs, shard)
    return fit_reward_models(
        lambda: _start(spec),
        inputs,
        log.observations,
        propensity,
        spec.methods,
        FitSettings(config.epochs, config.lr, BATCH_SIZE, seed=spec.seed),
        loss=LOSS,
        rates=None if config.rho is None else NoiseRates(*config.rho),
        noise_rates=config.noise_rates,
        clean_labels=None if spec.clean_labels is None else read_clean_labels(spec.clean_labels)[log.kept],
        judged=None if spec.judged is None else read_clean_labels(spec.judged)[log.kept],
        serving=None if spec.serving is None else SequenceScorer.from_pretrained(spec.serving).to(device),
        heldout=log.heldout,
        states=states,
        strata=log.traits.number,
        caution=config.caution,
        ranked=True,
        shard=shard,
    )


def _start(spec: FitSpec) -> SequenceScorer:
    scorer = SequenceScorer.from_pretrained(spec.start)
    torch.nn.init.zeros_(scorer.head.weight)  # states are kept, opinions are not
    return scorer
