"""Options of `chaos`: a tree of its own, read like the main one. Every default lives here and only here."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from causalrm_ray.config.base import RunConfig, Section

Victim = Literal["generator", "reward", "propensity", "log", "users", "train worker", "learner", "driver", "node", "cluster"]


class ChaosConfig(Section):
    """A run of the embedded world on a cluster of several raylets on this machine, processes of which are killed in turn."""

    victims: tuple[Victim, ...] = Field(
        ("generator", "reward", "propensity", "log", "users", "train worker", "learner", "driver", "node"),
        min_length=1,
        description="what is killed: [generator,driver]; cluster: every node with the driver and its supervisor; the job itself "
        "then resumes the run on another cluster",
    )
    kills: int = Field(21, ge=1, description="kills over all victims, in turn, in an order drawn from run.seed")
    nodes: int = Field(3, ge=2, description="raylets; the driver's own dies with the cluster only")
    steps: int = Field(150, ge=1, description="policy steps of the run; it must last until the last kill")
    baseline: bool = Field(True, description="do the same run without kills first, and compare")
    engine: Literal["vllm", "hf"] = Field("vllm", description="inference engine")
    train_workers: int = Field(2, ge=0, description="Ray Train workers of a fit; 0: none to kill")
    timeout_s: float = Field(600.0, gt=0, description="longest wait for a victim, and for the next step after a kill, seconds")
    run: RunConfig = RunConfig()
