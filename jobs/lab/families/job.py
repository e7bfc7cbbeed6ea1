"""Whether this installation is right over families of models: tiny ones of each are built and put through what a run does.

folder of a family --> engines  log-probabilities as loaded and after syncs, against transformers' plain formulas
                   --> reward   a saved reward model in transformers and vLLM, scores by rollout, log and chat
                   --> learner  a step under ZeRO 3, a checkpoint, a saved policy
"""

from __future__ import annotations

import logging
import shutil
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from transformers.utils import logging as transformers_logging

from actors.rollout.engine import EngineSettings
from causalrm_ray.checkpoint import read_json, write_json
from causalrm_ray.config.families import FamiliesConfig, FamilyName
from causalrm_ray.config.options import dump_config
from causalrm_ray.errors import InputError
from jobs.lab.families.builder import LENGTH, build
from jobs.lab.families.engines import check_engine
from jobs.lab.families.processes import prepare
from jobs.lab.families.rewards import check_reward
from jobs.lab.families.table import FAILED, REFUSED, Findings, conclude
from jobs.support.progress import Progress


def run(config: FamiliesConfig) -> int:
    """Run the job; 0 if every family is right or refused."""
    folder = config.run.path
    file = folder / "families.json"
    if file.exists() and not config.run.resume:
        raise InputError(f"{folder} holds figures already: remove it, or choose another run.name")
    dump_config(config, folder / "config.yaml")
    kept = [Findings(**each) for each in read_json(file)] if file.exists() else []
    wanted = {*config.parts} - {"engines"} | ({*config.engines} if "engines" in config.parts else set())
    found = [each for each in kept if each.passed() and wanted <= {*each.figures, *each.reasons}]
    known = {each.family for each in found}
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", module=r"torch\.distributed|peft")  # what they will do otherwise in later releases
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    for engine in config.engines:
        prepare(engine, str(folder), str(config.run.cache))
    with Progress() as progress:
        progress.tasks("families", len(config.families))
        for number, family in enumerate(config.families, 1):
            if family not in known:
                found.append(check(family, folder / "models" / family.replace(" ", "-"), config))
            write_json(file, [asdict(each) for each in found])
            progress.task(number, family)
    conclude(found, config, folder)
    return 0 if all(each.passed() for each in found) else 1


def check(family: FamilyName, folder: Path, config: FamiliesConfig) -> Findings:
    """What was found of a family; its folders are removed."""
    model, found = str(folder / "model"), Findings(family)
    try:
        build(family, Path(model))
    except Exception as error:  # of one family, in this release of a library
        logging.getLogger(__name__).exception("%s", family)
        return Findings(family, reasons={part: f"{FAILED}: {type(error).__name__}: {error}" for part in config.parts})
    checks: dict[str, Callable[[], Mapping[str, float]]] = {}
    if "engines" in config.parts:
        for engine in config.engines:
            settings = EngineSettings(model, LENGTH, "float32", str(config.run.cache), config.timeout_s, 4)
            checks[engine] = lambda engine=engine, settings=settings: check_engine(engine, settings)
    if "reward" in config.parts:
        checks["reward"] = lambda: check_reward(model, folder / "reward", "vllm" in config.engines)
    if "learner" in config.parts:
        from jobs.lab.families.learner import check_learner  # only now: it loads DeepSpeed

        checks["learner"] = lambda: check_learner(model, folder)
    for part, call in checks.items():
        try:
            found.figures[part] = dict(call())
        except InputError as error:
            found.reasons[part] = f"{REFUSED}: {error}"
        except Exception as error:  # whatever a library raises is what the table is to say
            logging.getLogger(__name__).exception("%s, %s", family, part)
            found.reasons[part] = f"{FAILED}: {type(error).__name__}: {error}"
    shutil.rmtree(folder)
    return found
