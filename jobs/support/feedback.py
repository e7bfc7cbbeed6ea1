"""Where a run's feedback comes from: a log that the user already has, or the embedded world's users."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from rich.console import Console
from transformers import PreTrainedTokenizerBase

from actors.system import Roles
from causalrm_ray.config.train import Config
from causalrm_ray.data.log.import_log import LengthLimit, import_log
from causalrm_ray.data.log.reading import Origin
from causalrm_ray.data.log.store import open_log
from causalrm_ray.data.log.summary import summarise_log
from causalrm_ray.data.snapshots.table import check_counts
from causalrm_ray.errors import InputError
from causalrm_ray.models.text import LengthBound, encode_pair
from jobs.support.log import warn
from jobs.support.prompts import EPOCH_S, PromptSource


def import_feedback(config: Config, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any] | None:
    """Import `feedback.source` into the log, and refuse a log that no fit could use, before anything heavy starts.

    Returns the import's report; None where nothing is imported.
    """
    log = open_log(config)
    report = None
    if config.feedback.source is not None:
        quarantine = config.run.path / "quarantine.jsonl"
        report = asdict(import_log(origin(config), log, quarantine, limit=length_limit(config, tokenizer)))
        if report["quarantined"]:
            warn(f"{report['quarantined']} of {report['rows']} rows are unusable; see {quarantine}")
        for note in report["warnings"]:
            warn(note)
    snapshot = log.seal(config.run.path, "log")
    log.close()
    found = summarise_log(snapshot)
    Console().print(
        f"log: {found.impressions} impressions, {found.observed} with feedback, {found.liked} of them liked, {found.users} users,"
        f" at most {found.max_turns} turns",
        soft_wrap=True,
    )
    check_counts(found.impressions, found.observed, found.liked)
    return report


def length_limit(config: Config, tokenizer: PreTrainedTokenizerBase) -> LengthLimit:
    """Refuses rows of more than model.max_length tokens; only what could be too long is tokenized."""
    return LengthLimit(
        lambda prompt, response: len(encode_pair(tokenizer, prompt, response)), config.model.max_length, LengthBound(tokenizer)
    )


def origin(config: Config) -> Origin:
    """Where the configured log comes from, and how it is read."""
    given = config.feedback
    return Origin(given.source or (), given.format, given.columns, given.events, given.query)


def simulate_feedback(config: Config, task: PromptSource, roles: Roles) -> int:
    """Let the policy answer `world.impressions` prompts and simulated users react; returns the number of impressions.

    Raises InputError if the log holds anything but this run's own impressions: real feedback is never mixed with simulated.
    """
    log = open_log(config)
    foreign = log.count_others(f"{config.run.name}/")
    log.close()
    if foreign:
        raise InputError(f"{config.log_url} must hold no impressions of others where users are simulated, got {foreign}")
    return roles.stream.fill_log(task.log_requests(), lambda done: task.impressions(done, EPOCH_S))
