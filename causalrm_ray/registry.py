"""What a user chooses by name, ours or another package's: estimators, algorithms, feedback formats, engines, trackers.

    name --table, entry point or register()--> import path --load--> the object      a choice loads nothing until it is used

Another package adds to a registry by an entry point in the registry's group; a configuration may also name an import path,
"package.module:object", and a program of your own may call `register`, which holds in that process only.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any


class Registry:
    """Objects of one kind by name. `group` is that of entry points; `built_in` maps our names to import paths; `attributes` are
    what an object of the kind must have."""

    def __init__(self, kind: str, group: str, built_in: Mapping[str, str], attributes: Sequence[str] = ()) -> None:
        self.kind, self.group, self.attributes = kind, group, attributes
        self._built_in = dict(built_in)
        self._registered: dict[str, Any] = {}

    def register(self, name: str, target: Any) -> None:
        """Add `target`, an object or its import path, as `name` in this process. Raises ValueError for a name that is taken."""
        if name in self.names():
            raise ValueError(f"{self.kind} {name!r} is registered already")
        self._registered[name] = target

    def names(self) -> tuple[str, ...]:
        """All names: ours first, then those of other packages."""
        return tuple(dict.fromkeys((*self._built_in, *self._registered, *entry_points(group=self.group).names)))

    def check(self, name: str) -> str:
        """`name`, if it is known or an import path. Ours are not imported; another package's is, so that a wrong one is refused
        now. Raises ValueError that names the nearest, or why it cannot be imported."""
        if name in self._built_in:
            return name
        if name in self.names() or ":" in name:
            self.load(name)
            return name
        nearest = difflib.get_close_matches(name, self.names(), n=1, cutoff=0.4)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
        known = ", ".join(self.names())
        raise ValueError(f"must be one of {known}, or an import path 'package.module:object', got {name!r}{hint}")

    def load(self, name: str) -> Any:
        """The object behind a name or an import path. Raises ValueError where there is none of the kind, with the reason."""
        target = self._registered.get(name) or self._built_in.get(name) or (name if ":" in name else None)
        if target is None:
            declared = entry_points(group=self.group, name=name)
            target = next(iter(declared)).value if declared else self.check(name)
        found = import_path(target, self.kind) if isinstance(target, str) else target
        if missing := [attribute for attribute in self.attributes if not hasattr(found, attribute)]:
            raise ValueError(f"{self.kind} {name!r} must have the attributes {', '.join(missing)}, got {found!r}")
        return found


def import_path(path: str, kind: str) -> Any:
    """The object at "package.module:object"; "module:table.key" reads a key of a mapping. Raises ValueError with the reason."""
    module, _, attributes = path.partition(":")
    try:
        found: Any = import_module(module)
        for part in attributes.split("."):
            found = found[part] if isinstance(found, Mapping) else getattr(found, part)
    except (ImportError, AttributeError, KeyError, TypeError, ValueError, SyntaxError) as error:
        raise ValueError(f"{kind} {path!r} cannot be imported: {error}") from error
    return found


def _table(path: str, *names: str) -> dict[str, str]:
    return {name: f"{path}.{name}" for name in names}


_METHODS = "causalrm_ray.estimators.methods"
ESTIMATORS = Registry(
    "estimator",
    "causalrm_ray.estimators",
    {
        **_table(f"{_METHODS}.reweighting:REWEIGHTING", "naive", "ips", "snips", "dr", "causalrm_ips", "causalrm_snips"),
        **_table(f"{_METHODS}.reweighting:REWEIGHTING", "causalrm_dr", "causalrm_ips_surrogate", "causalrm_dr_surrogate"),
        **_table(f"{_METHODS}.multitask:MULTITASK", "mt_ips", "mt_dr", "sdr", "cvib"),
        **_table(f"{_METHODS}.denoising:DENOISING", "f_correction", "co_teaching", "codis", "labelwave", "eps_softmax"),
        **_table(f"{_METHODS}.denoising:DENOISING", "robust_dividemix", "selectmix", "ilde"),
        **_table(f"{_METHODS}.selection:SELECTION", "latent", "two_stage", "auto"),
        **_table(f"{_METHODS}.class_wise:CLASS_WISE", "causalrm_ips_stable", "causalrm_dr_stable"),
    },
    ("paper", "needs", "fit"),
)
ALGORITHMS = Registry(
    "algorithm",
    "causalrm_ray.algorithms",
    {
        **_table("causalrm_ray.rl.algorithms:ALGORITHMS", "ppo", "grpo", "rloo", "reinforce_pp"),
        **_table("causalrm_ray.rl.algorithms:ALGORITHMS", "gspo", "dapo", "dr_grpo", "cispo"),
    },
    ("advantages", "loss", "ratio", "reduction", "clip", "kl", "critic", "grouped"),
)
_FORMATS = "causalrm_ray.data.formats"
FORMATS = Registry(
    "feedback format",
    "causalrm_ray.formats",
    {
        "native": f"{_FORMATS}.native:Native",
        "trl": f"{_FORMATS}.trl:Trl",
        "openai": f"{_FORMATS}.chats.openai:OpenAi",
        "openwebui": f"{_FORMATS}.chats.openwebui:OpenWebUi",
        "librechat": f"{_FORMATS}.chats.librechat:LibreChat",
        "wildchat": f"{_FORMATS}.chats.conversations:WildChat",
        "arena": f"{_FORMATS}.chats.conversations:Arena",
        "oasst": f"{_FORMATS}.chats.oasst:Oasst",
        "langfuse": f"{_FORMATS}.traces.langfuse:Langfuse",
        "langsmith": f"{_FORMATS}.traces.langsmith:LangSmith",
        "tensorzero": f"{_FORMATS}.traces.tensorzero:TensorZero",
        "phoenix": f"{_FORMATS}.traces.phoenix:Phoenix",
        "mlflow": f"{_FORMATS}.traces.mlflow:MlFlow",
        "opentelemetry": f"{_FORMATS}.traces.opentelemetry:OpenTelemetry",
        "argilla": f"{_FORMATS}.argilla:Argilla",
    },
    ("columns", "read"),
)
ENGINES = Registry(  # by import path: engines and trackers are on the floors above
    "engine",
    "causalrm_ray.engines",
    {"vllm": "actors.rollout.vllm_engine:VllmEngine", "hf": "actors.rollout.hf_engine:HfEngine"},
    ("tensor_parallel", "shares_process", "transports", "process_bytes", "requires", "process_env"),
)
TRACKERS = Registry(
    "tracker",
    "causalrm_ray.trackers",
    {
        "tensorboard": "jobs.support.trackers:TensorBoard",
        "wandb": "jobs.support.trackers:WandB",
        "mlflow": "jobs.support.trackers:MlFlow",
    },
    ("start", "log", "finish"),
)
