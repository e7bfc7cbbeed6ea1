"""A log as a fit would read it, in figures: what it holds, what is not read and why, and whether it is enough."""

from __future__ import annotations

import itertools
import json
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from causalrm_ray.config.check import CheckConfig
from causalrm_ray.config.train import EMBEDDED
from causalrm_ray.conversation import Conversation
from causalrm_ray.data.log.import_log import ImportReport, LengthLimit, import_log
from causalrm_ray.data.log.store import FeedbackLog
from causalrm_ray.data.log.summary import LogSummary, Refused, summarise_log, summarise_quarantine
from causalrm_ray.data.snapshots.table import SnapshotError, check_counts, read_columns
from causalrm_ray.errors import ConfigError
from causalrm_ray.truncation import Cuts
from jobs.support.feedback import count_cuts, cut_notes, length_limit, origin

MOST_LOST = 0.05  # share of the reactions that may be lost; above it the exit status is 1
SHOWN = 3  # rows that are printed as the model reads them


def run(config: CheckConfig) -> int:
    """Print what there is; 1 if more than 5 % of the reactions would be lost, or no fit could use the log."""
    if config.feedback.source is None:
        raise ConfigError("feedback.source: check-log needs a log to read, got none")
    tokenizer = None
    if config.model.reward != EMBEDDED:
        from causalrm_ray.models.text import load_tokenizer
        from jobs.support.prompts import find_model

        tokenizer = load_tokenizer(find_model(config, config.model.reward, template=config.model.chat_template))
    with tempfile.TemporaryDirectory(prefix="check-log-") as folder:
        log = FeedbackLog(f"sqlite:///{folder}/log.db", config.feedback.signals, config.feedback.order)
        quarantine = Path(folder) / "quarantine.jsonl"
        limit = length_limit(config, tokenizer) if tokenizer else None
        report = import_log(origin(config), log, quarantine, limit=limit)
        snapshot = Path(folder) / "log.parquet"
        log.export(snapshot)
        log.close()
        summary, cuts = summarise_log(snapshot), count_cuts(snapshot, limit) if limit else Cuts()
        found = describe(report, summary, summarise_quarantine(quarantine), _enough(summary), cuts)
        found["warnings"] += cut_notes(cuts, summary.impressions, config)
        if config.json:
            print(json.dumps(found, ensure_ascii=False))
        else:
            _print(found, _as_read(snapshot, tokenizer, limit), tokenizer is None)
    return int(found["enough"] is not True or found["lost"] > MOST_LOST)


def describe(report: ImportReport, log: LogSummary, refused: Refused, enough: str | None, cuts: Cuts) -> dict[str, Any]:
    """All figures, as JSON. `lost` is the share of reactions that are not read; `truncated` is about rows that are read without
    their oldest turns; `enough` is true, or why no fit is possible."""
    reactions = log.observed + refused.reactions
    return {
        "format": ", ".join(report.formats),
        "rows": report.rows,
        "events": report.events,
        **{name: value for name, value in asdict(log).items() if name != "concentration"},
        "quarantined": report.quarantined,
        "quarantined_by_reason": refused.reasons,
        "quarantined_reactions": refused.labels,
        "truncated": cuts.figures(),
        "lost": refused.reactions / reactions if reactions else 0.0,
        "ignored_columns": list(report.ignored_columns),
        "ignored": dict(report.ignored),
        "warnings": [*report.warnings, *log.concentration],
        "enough": enough or True,
    }


def _enough(log: LogSummary) -> str | None:
    """Why no fit could use the log; None if one can."""
    try:
        check_counts(log.impressions, log.observed, log.liked)
    except SnapshotError as error:
        return str(error)
    return None


def _as_read(snapshot: Path, tokenizer: Any, limit: LengthLimit | None) -> list[str]:
    """A few rows as the model reads them, or as they are kept where no model is given."""
    batches = read_columns(snapshot, ["prompt", "response"])
    rows = [row for batch in itertools.islice(batches, 1) for row in batch.slice(0, SHOWN).to_pylist()]
    if limit is None:
        return [f"{row['prompt']}\n-> {row['response']}" for row in rows]
    pairs = [(Conversation(row["prompt"]), row["response"]) for row in rows]
    return [tokenizer.decode(found.ids if (found := limit.truncate(*pair)) else limit.encode(*pair)) for pair in pairs]


def _print(found: dict[str, Any], rows: list[str], no_model: bool) -> None:
    console = Console(highlight=False, markup=False, soft_wrap=True)  # names of columns may hold brackets
    table = Table("what", "found", box=None, pad_edge=False)
    for name, value in found.items():
        if name in ("warnings", "enough", "lost"):
            continue
        shown = "; ".join(f"{key}: {count}" for key, count in value.items()) if isinstance(value, dict) else value
        table.add_row(name.replace("_", " "), ", ".join(shown) if isinstance(shown, list) else str(shown))
    table.add_row("reactions lost", f"{found['lost']:.1%}")
    console.print(table)
    for warning in found["warnings"]:
        console.print(f"warning: {warning}", style="yellow")
    console.print(
        "As kept; model.reward=MODEL shows them as it reads them, and checks their lengths:" if no_model else "As read:"
    )
    for row in rows:
        console.print(row, style="dim")
    enough = found["enough"]
    console.print("enough for a fit" if enough is True else f"not enough for a fit: {enough}")
