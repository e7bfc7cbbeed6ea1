"""What each Ray Train worker does in a reward fit: the same rows and seeds, its own slice of every batch, one folder.

order: snapshot -> token rows -> fit_reward_models (DDP, this rank's shard) -> rank 0: METHOD/ (Hugging Face folders), report.json
"""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import ray
import ray.train
import ray.train.torch
import torch
from ray.train.collective import broadcast_from_rank_zero

from actors.reward.fit_spec import BATCH_SIZE, LOSS, REPORT, FitSpec
from actors.reward.snapshot_rows import SnapshotRows, load_rows
from causalrm_ray.checkpoint import atomic_folder, write_json
from causalrm_ray.data.collate import TokenRows
from causalrm_ray.estimators.core.frozen import frozen_states
from causalrm_ray.estimators.core.training import FitSettings, Inputs, Shard, predict
from causalrm_ray.estimators.diagnostics.diagnose import diagnose_fit
from causalrm_ray.estimators.diagnostics.groups import diagnose_groups, diagnose_signals
from causalrm_ray.estimators.pipeline import RewardFits, fit_reward_models
from causalrm_ray.models.reward_model import SequenceScorer
from causalrm_ray.models.text import load_tokenizer
from causalrm_ray.types import NoiseRates


def work(orders: Any) -> None:
    """Fit what lies at `orders` (an actor, `fit_order.FitQueue`) with the other workers, order after order, until it closes."""
    context = ray.train.get_context()
    shard = Shard(context.get_world_rank(), context.get_world_size(), ray.train.torch.prepare_model)
    device = ray.train.torch.get_device()
    while (taken := broadcast_from_rank_zero(None if shard.rank else ray.get(orders.take.remote()))) is not None:
        number, order, folder = taken
        if shard.rank:
            fit_into(folder, order, shard, device)
            continue
        with atomic_folder(folder) as aside:
            seconds = fit_into(aside, order, shard, device)
        ray.get(orders.done.remote(number, seconds))


def fit_into(folder: Path, order: FitSpec, shard: Shard, device: torch.device) -> float:
    """Fit as `order` says; rank 0 writes models and figures to `folder`. Returns the seconds that it took."""
    torch.set_num_threads(1)  # sums in one order, and no workers fighting for a core
    started = time.perf_counter()
    tokenizer = load_tokenizer(order.backbone)
    log = load_rows(order.snapshot, tokenizer, order.max_length)
    inputs = TokenRows(log.token_rows, tokenizer.pad_token_id)
    fits = _fit(order, inputs, log, shard, device)
    if shard.rank == 0:
        for method, fitted in fits.fits.items():
            cast(SequenceScorer, fitted.module).save_pretrained(folder / method, tokenizer)
        write_json(folder / REPORT, describe(fits, order, inputs, log))
    return time.perf_counter() - started


def describe(fits: RewardFits, order: FitSpec, inputs: Inputs, log: SnapshotRows) -> dict[str, Any]:
    """Figures of a fit as JSON, with the diagnostics of the model that may serve; the same fit gives the same figures."""
    config, observations = order.config, log.observations
    logit = predict(fits.fits[config.method].module, inputs, fits.heldout)
    diagnostics = diagnose_fit(fits, config.method, observations, torch.tensor(order.propensity), logit, LOSS, order.seed)
    opinion = fits.fits[config.method].opinion
    groups = {
        name: asdict(diagnose_groups(fits.ranking, opinion, observations, fits.rates, groups, order.seed))
        for name, groups in (("traits", log.traits), ("lengths", log.lengths))
    }
    signals = diagnose_signals(fits.ranking, log.signals, order.seed)
    methods = {
        name: {
            "heldout_risk": fitted.heldout_risk,
            "best_epoch": fitted.report.best.number,
            "figures": dict(fitted.figures),
            "epochs": [asdict(e) for e in fitted.report.epochs],
        }
        for name, fitted in fits.fits.items()
    }
    return {
        "methods": methods,
        "diagnostics": {
            **asdict(diagnostics),
            "groups": groups,
            "signals": None if signals is None else {name: asdict(rate) for name, rate in signals.items()},
        },
        "rates": asdict(fits.rates),
        "rates_by": config.method if fits.noise is None and config.rho is None else None,
        "noise": None if fits.noise is None else asdict(fits.noise),
        "heldout_rows": len(fits.heldout),
        "serving_risk": fits.serving_risk,
        "serving_version": order.serving_version,
    }


def _fit(order: FitSpec, inputs: Inputs, log: SnapshotRows, shard: Shard, device: torch.device) -> RewardFits:
    config = order.config
    # States of the backbone as it came: those of the propensity model have seen whose feedback is to be explained.
    states = frozen_states(SequenceScorer.from_pretrained(order.backbone).to(device), inputs, shard)
    return fit_reward_models(
        lambda: _start(order),
        inputs,
        log.observations,
        torch.tensor(order.propensity),
        order.methods,
        FitSettings(config.epochs, config.lr, BATCH_SIZE),
        loss=LOSS,
        rates=None if config.rho is None else NoiseRates(*config.rho),
        noise_rates=config.noise_rates,
        clean_labels=None if order.clean_labels is None else torch.tensor(order.clean_labels),
        serving=None if order.serving is None else SequenceScorer.from_pretrained(order.serving).to(device),
        heldout=log.heldout,
        states=states,
        strata=log.traits.number,
        caution=config.caution,
        shard=shard,
        seed=order.seed,
    )


def _start(order: FitSpec) -> SequenceScorer:
    scorer = SequenceScorer.from_pretrained(order.start)
    torch.nn.init.zeros_(scorer.head.weight)  # states are taken over, opinions are not
    return scorer
