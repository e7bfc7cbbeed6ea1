"""report.html of a run: its pictures and figures in one file that needs nothing else."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from causalrm_ray.report.fit_section import fit_section
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
STYLE = """
body{font:15px/1.5 system-ui,sans-serif;color:#1a202c;max-width:1080px;margin:2rem auto;padding:0 1rem}
h1{font-size:1.5rem}h2{font-size:1.1rem;margin-top:2rem}img{max-width:100%}
table{border-collapse:collapse}td,th{padding:.25rem .8rem;border-bottom:1px solid #e2e8f0;text-align:left;vertical-align:top}
pre{background:#f7fafc;padding:1rem;overflow:auto;font-size:12px}
"""


def write_report(folder: Path, metrics: Sequence[Mapping[str, float]], summary: Mapping[str, Any]) -> Path:
    """Write `folder`/report.html from a run's metrics (one mapping a step; none for a fit alone) and its summary."""
    parts = [f"<h1>{html.escape(folder.name)}</h1>", _headline(summary)]
    if metrics:
        steps = [partial(_draw_steps, metrics=metrics, of=of) for of in STEPS]
        parts += ["<h2>The policy, step by step</h2>", picture(steps, "reward, KL, entropy and mismatch by step")]
    parts += fit_section(summary)
    if "answers" in summary:
        pairs = [(html.escape(row["prompt"]), html.escape(row["response"])) for row in summary["answers"]]
        rows = "".join(f"<tr><td>{asked}</td><td>{answered}</td></tr>" for asked, answered in pairs)
        parts += [f"<h2>Answers on held-out topics, after</h2><table><tr><th>asked</th><th>answered</th></tr>{rows}</table>"]
    rest = {key: value for key, value in summary.items() if key != "diagnostics"}
    figures = html.escape(json.dumps(rest, indent=2, sort_keys=True))
    parts += [f"<h2>All figures</h2><p>What the pictures of the fit show is in diagnostics.json.</p><pre>{figures}</pre>"]
    page = f"<!doctype html><meta charset='utf-8'><title>{html.escape(folder.name)}</title><style>{STYLE}</style>{''.join(parts)}"
    path = folder / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def _headline(summary: Mapping[str, Any]) -> str:
    lines = []
    if "oracle_reward" in summary:
        oracle = summary["oracle_reward"]
        gain = (oracle["after"] - oracle["before"]) / oracle["stderr"]
        change = f"{oracle['before']:.2f} → {oracle['after']:.2f}, {gain:.0f} standard errors"
        lines.append(f"Oracle reward on held-out topics (0 to 4): {change}.")
    if "feedback" in summary:
        feedback = summary["feedback"]
        audit = f"lost {feedback['lost']}, doubled {feedback['duplicated']}"
        lines.append(f"{feedback['impressions']} impressions, {feedback['events']} feedback events; {audit}.")
    if "wall_s" in summary:
        lines.append(f"{summary['wall_s']:.0f} s; peak memory {summary['peak_memory_bytes'] / 2**30:.1f} GiB.")
    return "".join(f"<p>{html.escape(line)}</p>" for line in lines)


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
