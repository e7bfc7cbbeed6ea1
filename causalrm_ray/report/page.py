"""report.html of a run: verdict, warnings, pictures and figures in one self-contained file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, FileSystemLoader

from causalrm_ray.report.fit_panels import (
    fit_panels,
    level_sentence,
    preference_sentence,
    ranking_sentence,
    states_sentence,
)
from causalrm_ray.report.pictures import BLUE, GREY, ORANGE, picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MISMATCH = "engine / learner mismatch"
STEPS = (  # title, unit, metrics
    ("reward of a step's answers", "", ("reward", "oracle_mean")),
    ("KL to the starting policy", "nats per answer", ("kl",)),
    ("entropy", "nats per token", ("entropy",)),
    (MISMATCH, "|log-probability difference|", ("logprob_mismatch_mean_abs", "logprob_mismatch_max_abs")),
)
TEMPLATES = Path(__file__).with_name("templates")


def write_report(folder: Path, metrics: Sequence[Mapping[str, float]], summary: Mapping[str, Any]) -> Path:
    """Write `folder`/report.html from a run's metrics (one mapping a step; none for a fit alone) and its summary.

    Texts of users, prompts and answers stay text: the template escapes them.
    """
    environment = Environment(loader=FileSystemLoader(TEMPLATES), autoescape=True)
    found = summary["diagnostics"]
    fit, selection, sensitivity = map(picture, fit_panels(summary))
    page = environment.get_template("report.html").render(
        name=folder.name,
        summary=summary,
        found=found,
        ranking=ranking_sentence(found["ranking"]),
        level=level_sentence(summary),
        states=states_sentence(summary),
        preference=preference_sentence(found),
        steps=picture([partial(_draw_steps, metrics=metrics, of=of) for of in STEPS]) if metrics else None,
        fit=fit,
        selection=selection,
        sensitivity=sensitivity,
        figures=json.dumps({key: value for key, value in summary.items() if key != "diagnostics"}, indent=2, sort_keys=True),
    )
    path = folder / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def _draw_steps(panel: Axes, metrics: Sequence[Mapping[str, float]], of: tuple[str, str, Sequence[str]]) -> None:
    title, unit, names = of
    for name, colour in zip(names, (BLUE, ORANGE), strict=False):
        known = [(row["step"], row[name]) for row in metrics if name in row]
        if known:
            panel.plot(*zip(*known, strict=True), color=colour, label=name.replace("_", " "))
    panel.set(title=title, xlabel="step", ylabel=unit)
    panel.legend(frameon=False, fontsize=8)
    if "reward" in names:
        for row in metrics:
            if row.get("refit_promoted") is not None:
                panel.axvline(row["step"], color=GREY, linestyle=":" if row["refit_promoted"] else "-", linewidth=1)
    if title == MISMATCH:
        panel.set_yscale("log")
