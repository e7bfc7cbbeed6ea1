"""Starts the roles of a reward fit: features, propensity, reward."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from actors.allocated import Allocated
from actors.cluster.environment import compute_env
from actors.cluster.place import Placement, place
from actors.features.states import FeaturesActor
from actors.reward.propensity_actor import PropensityActor
from actors.reward.reward_actor import RewardActor
from causalrm_ray.config.train import Config
from causalrm_ray.models.identity import model_digest
from causalrm_ray.models.states.backbone import Backbone, reward_backbone, states_folder
from causalrm_ray.models.text import generation_stops


def _start_features(config: Config, backbone: Backbone, cache: Path, allocated: Allocated) -> dict[str, Any]:
    """The roles that compute states of a backbone, by name."""
    names = [role for role in allocated.plan.allocations if role.startswith("features")]
    options = {"env": compute_env(allocated.on_gpu), "restarts": config.loop.max_failures}
    return {
        name: place(
            FeaturesActor,
            allocated.placement(name, **options),
            backbone.model,
            cache,
            max_length=config.model.max_length,
            truncation=config.model.truncation,
            dtype=getattr(torch, backbone.dtype),
            device="cuda" if allocated.on_gpu else "cpu",
            part=part,
            parts=len(names),
        )
        for part, name in enumerate(names)
    }


def start_reward(config: Config, policy: str, model: str, allocated: Allocated) -> tuple[dict[str, Any], Any, Any]:
    """The roles that compute states, by name, and the propensity and reward roles, which read answers of `policy`. `model` is
    their backbone, a folder or hub id."""
    backbone = reward_backbone(config, model, model_digest(model), allocated.on_gpu)
    cache = states_folder(config.run.cache, backbone, config.model.max_length, config.model.truncation)
    features, restarts = _start_features(config, backbone, cache, allocated), config.loop.max_failures
    seed, folder = config.run.seed, config.run.path
    limits = {"max_length": config.model.max_length, "per_user": config.feedback.per_user, "seed": seed}
    fits = "propensity" in allocated.plan.allocations
    propensity = (
        place(
            PropensityActor,
            Placement("propensity", env=compute_env(False), restarts=restarts),
            cache,
            config.reward.clip,
            choice=config.model.states,
            memory=folder / "propensity" / "serving.json",
            **limits,
        )
        if fits
        else None
    )
    reward = place(
        RewardActor,
        allocated.placement("reward", env=compute_env(allocated.on_gpu), restarts=restarts),
        backbone,
        config.reward,
        cache=cache,
        folder=folder / "reward",
        timeout_s=config.cluster.timeout_s,
        stops=[*generation_stops(policy), *(end for end in config.rollout.stop if isinstance(end, int))],
        use_gpu=allocated.plan.fits_on_gpu,
        device="cuda" if allocated.on_gpu else "cpu",
        **limits,
    )
    return features, propensity, reward
