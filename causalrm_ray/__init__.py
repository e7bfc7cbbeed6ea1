"""Unbiased reward models from observational feedback (arXiv 2603.18736), and RLHF on them.

The public names load on first use, so that `import causalrm_ray` loads no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from causalrm_ray.api import RewardEstimator
    from causalrm_ray.reward import RewardModel

__all__ = ["RewardEstimator", "RewardModel"]
_HOMES = {"RewardEstimator": "causalrm_ray.api", "RewardModel": "causalrm_ray.reward"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
