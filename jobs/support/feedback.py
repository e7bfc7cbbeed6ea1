"""Where a run's feedback comes from: a log that the user already has, or the embedded world's users."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import PreTrainedTokenizerBase

from actors.system import Roles
from causalrm_ray.config.train import Config
from causalrm_ray.conversation import Conversation, ConversationError
from causalrm_ray.data.log.clean import clean_source, match_clean
from causalrm_ray.data.log.import_log import LengthLimit, import_log
from causalrm_ray.data.log.reading import Origin
from causalrm_ray.data.log.store import open_log
from causalrm_ray.data.log.summary import summarise_log
from causalrm_ray.data.rows import RowError
from causalrm_ray.data.snapshots.table import check_counts, read_columns
from causalrm_ray.errors import InputError, brief
from causalrm_ray.models.text import LengthBound, encode_pair
from causalrm_ray.truncation import Cuts
from jobs.support.log import warn
from jobs.support.prompts import EPOCH_S, PromptSource


def import_feedback(config: Config, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any] | None:
    """Import `feedback.source` into the log, and refuse a log that no fit could use, before anything heavy starts.

    Returns the import's report; None where nothing is imported.
    """
    log, limit = open_log(config), length_limit(config, tokenizer)
    report = None
    if config.feedback.source is not None:
        quarantine = config.run.path / "quarantine.jsonl"
        report = asdict(import_log(origin(config), log, quarantine, limit=limit))
        if report["quarantined"]:
            warn(f"{report['quarantined']} of {report['rows']} rows are unusable; see {quarantine}")
        for note in report["warnings"]:
            warn(note)
    snapshot = log.seal(config.run.path, "log")
    log.close()
    if source := clean_source(config.feedback):  # refused before anything heavy starts; every fit reads it again
        counts = match_clean(source.read(), snapshot)[1]
        for note in counts.warnings:
            warn(f"{note} The first is {brief(counts.missing)}.")
    found = summarise_log(snapshot)
    for note in cut_notes(count_cuts(snapshot, limit), found.impressions, config):
        warn(note)
    Console().print(
        f"log: {found.impressions} impressions, {found.observed} with feedback, {found.liked} of them liked, {found.users} users,"
        f" at most {found.max_turns} turns",
        soft_wrap=True,
    )
    check_counts(found.impressions, found.observed, found.liked)
    return report


def length_limit(config: Config, tokenizer: PreTrainedTokenizerBase) -> LengthLimit:
    """Refuses rows of more than model.max_length tokens, by model.truncation; only what could be too long is tokenized."""
    limits = config.model
    return LengthLimit(partial(encode_pair, tokenizer), limits.max_length, LengthBound(tokenizer), limits.truncation)


def count_cuts(snapshot: Path, limit: LengthLimit) -> Cuts:
    """What a fit would read without its oldest turns; none where `limit` drops no turns."""
    cuts, columns = Cuts(), ("prompt", "response", "label")
    for batch in read_columns(snapshot, columns) if limit.truncation == "oldest" else ():
        for prompt, response, label in zip(*(batch[name].to_pylist() for name in columns), strict=True):
            with suppress(RowError, ConversationError):  # of a log that was not imported here: the fit refuses it by its id
                if found := limit.truncate(Conversation(prompt), response):
                    cuts.add(found, label)
    return cuts


def cut_notes(cuts: Cuts, impressions: int, config: Config) -> list[str]:
    """What is to be said of rows without their oldest turns."""
    return cuts.warnings(impressions, f"{config.model.max_length} tokens (model.max_length)")


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
