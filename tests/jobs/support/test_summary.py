"""What a fit leaves in a run's folder: diagnostics.json, and the same in pictures and words in report.html."""

from __future__ import annotations

import base64
import html
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from markupsafe import escape
from matplotlib.figure import Figure

from actors.reward.promotion import Promotion
from actors.reward.report import LogDiagnostics, MethodReport, Refit, RewardReport, VersionedPropensity
from causalrm_ray.config.options import load_config
from causalrm_ray.data.log.clean import CleanCounts
from causalrm_ray.estimators.core.task import Fitted, Observations
from causalrm_ray.estimators.core.training import Epoch, FitReport
from causalrm_ray.estimators.diagnostics.diagnose import diagnose_fit
from causalrm_ray.estimators.diagnostics.groups import Groups, Signals, diagnose_groups, diagnose_signals
from causalrm_ray.estimators.diagnostics.selection_posterior import explained
from causalrm_ray.estimators.nuisances.level import fit_level
from causalrm_ray.estimators.nuisances.noise_rates import NoiseEstimate
from causalrm_ray.estimators.nuisances.propensity import diagnose
from causalrm_ray.estimators.pipeline import RewardFits
from causalrm_ray.report.fit_panels import fit_panels, fit_sentences, level_sentence
from causalrm_ray.report.page import write_report
from causalrm_ray.types import NoiseRates
from jobs.support.run_folder import Run
from jobs.support.summary import fit_summary, with_drift

AUTO = {"weight_features": 0.97, "weight_label": 0.03, "heldout_features": 0.61, "heldout_label": 0.63, "signal": 5.0}
AUTO |= {"adds_features": 6.0, "adds_label": 0.3, "shift_used": 0.0, "shift_found": 0.1}
RATES = NoiseRates(0.1, 0.2)


def fit(figures: dict[str, float], noise: NoiseEstimate | None) -> Refit:
    """A fit as Refitter.refit returns it, of a model that knows the truth."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2000, generator=generator)
    propensity = torch.sigmoid(2 * torch.randn(2000, generator=generator) - 1)
    o = (torch.rand(2000, generator=generator) < propensity).float()
    clean = (x > 0).float()
    wrong = torch.where(clean == 1, RATES.rho_01, RATES.rho_10)
    observations = Observations(o, torch.where(torch.rand(2000, generator=generator) < wrong, 1 - clean, clean))
    heldout, best = torch.arange(1500, 2000), Epoch(1, 0.6, 0.6)
    joint = propensity[:, None] * torch.stack([torch.sigmoid(6 * x), torch.sigmoid(-6 * x)], 1)
    own = (6 * x, RATES, (propensity, propensity), joint) if figures else ()
    one = Fitted(torch.nn.Identity(), FitReport((best,), best), figures, *own)
    fits = RewardFits({"auto": one}, {"auto": 0.6}, RATES, noise, None, None, None, None, heldout)
    found = diagnose_fit(fits, "auto", observations, propensity.clamp(min=0.1), 2 * x[heldout])
    ranking = torch.sigmoid(2 * x)
    groups = Groups((torch.arange(2000) % 2), ("style=flashy", "style=plain"))
    place = torch.where(o == 1, observations.r * 2 + (torch.arange(2000) % 3 == 0), -1).long()
    signals = diagnose_signals(ranking, Signals(place, ("downvote", "regenerate", "upvote", "copy"), (0, 0, 1, 1)))
    groups = {"traits": diagnose_groups(ranking, explained(fits, "auto"), observations, groups)}
    methods = {"auto": MethodReport(0.6, 1), "naive": MethodReport(0.7, 1)}
    diagnostics = LogDiagnostics(**vars(found), groups=groups, signals=signals)
    reward = RewardReport(methods, diagnostics, RATES, noise, len(heldout), None, 0)
    report = VersionedPropensity(**vars(diagnose(propensity, o, 0.1)), version=1)
    return Refit(report, reward, {"auto": "reward/log/auto"}, 2.0, 1.0, Promotion(True, "first model", 1))


@pytest.fixture(scope="module")
def summary() -> dict[str, Any]:
    """Summary of a fit by `auto`, after a trip through JSON."""
    found = fit(AUTO, NoiseEstimate(RATES, (0.05, 0.35), (0.15, 0.25), 40, 40))
    return json.loads(json.dumps(fit_summary(found), allow_nan=False))


def images(page: str) -> list[bytes]:
    return [base64.b64decode(data) for data in re.findall(r'data:image/png;base64,([^"]+)"', page)]


def test_the_summary_holds_numbers_words_and_advice(summary: dict[str, Any]) -> None:
    found = summary["diagnostics"]
    assert found["propensity"]["clipped_share"] == summary["propensity"]["clipped_share"] > 0.2
    assert found["rates"] == summary["noise_rates"]
    assert found["verdict"].startswith("The log rules out that the opinion alone decides")
    warnings = " ".join(found["warnings"])
    assert "of the propensities lie below the clip" in warnings
    assert "rho_01 is known only to lie in 0.05 to 0.35" in warnings
    assert "rho_10" not in warnings
    downvotes = [found["signals"][name]["liked"] for name in ("downvote", "regenerate")]
    assert sum(downvotes) == pytest.approx(found["groups"]["traits"]["rates"]["style=plain"]["rates"]["rho_01"], abs=0.15)
    assert not any(group["differ"] for group in found["groups"]["traits"]["selection"].values())


def test_a_run_keeps_its_diagnostics_as_json(tmp_path: Path, summary: dict[str, Any]) -> None:
    run = Run(load_config(None, [f"run.dir={tmp_path}", "run.name=fit"]))
    run.summarise(summary)
    kept = (run.path / "diagnostics.json").read_text(encoding="utf-8")
    assert json.loads(kept) == summary["diagnostics"]
    assert len(kept) < 30_000
    other = Run(load_config(None, [f"run.dir={tmp_path}", "run.name=other"]))
    other.summarise({"steps": 1})
    assert not (other.path / "diagnostics.json").exists()


def test_the_report_shows_pictures_words_and_advice(tmp_path: Path, summary: dict[str, Any]) -> None:
    page = write_report(tmp_path, [], summary).read_text(encoding="utf-8")
    pictures = images(page)
    assert [picture[:8] for picture in pictures] == [b"\x89PNG\r\n\x1a\n"] * 3
    found = summary["diagnostics"]
    assert escape(found["verdict"]) in page
    assert all(f"<li>{escape(warning)}</li>" in page for warning in found["warnings"])
    share = found["intervals"]["preference"]
    said = f"(95 % interval {share['low']:.0%} to {share['high']:.0%}), if what decides who gives feedback is prompt and answer;"
    assert said in html.unescape(page)
    assert "the better half by the model's score is liked more often by" in html.unescape(page)


def test_steps_and_fit_stand_in_one_report(tmp_path: Path, summary: dict[str, Any]) -> None:
    metrics = [
        {
            "step": step,
            "reward": 0.1,
            "kl": 0.2,
            "entropy": 1.0,
            "logprob_mismatch_mean_abs": 1e-6,
            "logprob_mismatch_max_abs": 1e-5,
        }
        for step in range(3)
    ]
    assert len(images(write_report(tmp_path, metrics, summary).read_text(encoding="utf-8"))) == 4


def test_drift_of_the_policy_stands_among_the_warnings(tmp_path: Path, summary: dict[str, Any]) -> None:
    rows = [{"step": step, "entropy": entropy} for step, entropy in enumerate([1.0, 1.0, 1.0, 0.1, 0.1, 0.1])]
    drifted = summary | {"diagnostics": with_drift(summary["diagnostics"], rows)}
    *others, last = drifted["diagnostics"]["warnings"]
    assert others == summary["diagnostics"]["warnings"]
    assert last.startswith("Entropy fell from 1.00 to 0.10")
    assert f"<li>{escape(last)}</li>" in write_report(tmp_path, [], drifted).read_text(encoding="utf-8")


def test_a_method_that_compares_no_mechanisms_and_given_rates_leave_no_empty_panel(tmp_path: Path) -> None:
    ends = fit_summary(fit(AUTO, None))["noise_rates"]["rho_01"]
    assert 0 < ends["low"] <= ends["estimate"] <= ends["high"] < 0.5
    plain = fit_summary(fit({}, None))
    assert plain["diagnostics"]["mechanisms"] is None
    assert plain["noise_rates"]["rho_01"] == {"estimate": 0.1, "low": None, "high": None, "truth": None}
    page = write_report(tmp_path, [], plain).read_text(encoding="utf-8")
    assert "auto assumes one selection mechanism" in page
    widths = [int.from_bytes(picture[16:20], "big") for picture in images(page)]
    assert widths[1] == pytest.approx(widths[0] * 2 / 3, abs=2)


def test_every_panel_shows_something_and_names_its_axes(summary: dict[str, Any]) -> None:
    panels = []
    for row in fit_panels(summary):
        for draw, panel in zip(row, Figure().subplots(1, len(row)), strict=True):
            draw(panel)
            panels.append(panel)
    assert len(panels) == 11
    assert all(panel.get_title() and (panel.has_data() or panel.patches) for panel in panels)
    named = {"label noise: rates of flipped labels", "reward models on held-out rows"}  # categories stand for their x axis
    assert {panel.get_title() for panel in panels if not panel.get_xlabel()} == named
    assert [panel.get_title() for panel in panels if not panel.get_ylabel()] == [
        "what decides who gives feedback",
        "who gives feedback, by trait",
    ]


def test_bars_of_the_overlap_are_shares_of_each_group(summary: dict[str, Any]) -> None:
    panel = Figure().subplots()
    fit_panels(summary)[1][0](panel)
    assert [sum(patch.get_data().values) for patch in panel.patches] == pytest.approx([1.0, 1.0])


def test_what_judged_rows_changed_is_said(tmp_path: Path, summary: dict[str, Any]) -> None:
    found = fit(AUTO, None)
    _, report = fit_level(torch.zeros(20), (torch.arange(20) % 5 == 0).float())
    judged = replace(found, reward=replace(found.reward, level={"auto": report}), clean=CleanCounts(20, 1, "gone"))
    stated = json.loads(json.dumps(fit_summary(judged), allow_nan=False))
    assert {key: stated["clean"][key] for key in ("matched", "unmatched")} == {"matched": 20, "unmatched": 1}
    assert stated["clean"]["level"]["auto"]["shift"] == report.shift
    warnings = " ".join(stated["diagnostics"]["warnings"])
    assert "1 of 21 rows of feedback.clean are of impressions that the log does not hold: they are left out." in warnings
    assert "gone" not in str(stated)  # an id that may have been forgotten
    assert "Only 20 rows were judged" in warnings
    sentence = level_sentence(stated)
    assert sentence is not None
    assert sentence.startswith("Of 20 judged rows 0.200 ± 0.092 are liked. The model said 0.500; at their level it says 0.")
    assert escape(sentence) in write_report(tmp_path, [], stated).read_text(encoding="utf-8")
    assert summary["clean"] is None
    assert level_sentence(summary) is None


def test_a_fit_is_said_in_a_few_sentences_its_verdict_first(tmp_path: Path, summary: dict[str, Any]) -> None:
    losses = {"final-last": 0.9277, "final-mean": 0.9313, "middle-last": 0.9293, "middle-mean": 0.9202}
    summary = {**summary, "propensity": {**summary["propensity"], "choice": {"states": "middle-mean", "losses": losses}}}
    sentences = fit_sentences(summary)
    assert sentences[0] == summary["diagnostics"]["verdict"]
    said = (
        "All models read the states middle-mean of the backbone: they explain held-out feedback best, 0.9202 nats a row "
        "(of the others: final-last 0.9277, middle-last 0.9293, final-mean 0.9313)."
    )
    assert said in sentences
    assert said in write_report(tmp_path, [], summary).read_text(encoding="utf-8")
    doubts = summary["diagnostics"]["warnings"]
    assert sentences[-1] == f"{len(doubts)} warnings, the first: {doubts[0]}"
    given = {**summary, "propensity": {"choice": {"states": "final-last", "losses": {}}}}
    assert "All models read the states final-last of the backbone (model.states)." in fit_sentences(given)


def test_a_user_s_text_in_a_report_stays_text_and_the_verdict_comes_first(tmp_path: Path, summary: dict[str, Any]) -> None:
    script = "<script>alert('x')</script>"
    folder = tmp_path / "<b>run"
    folder.mkdir()
    answers = [{"prompt": script, "response": script}]
    reward = {"before": 1.0, "after": 2.0, "stderr": 0.5}
    drifted = {**summary, "answers": answers, "oracle_reward": reward, "note": script}
    page = write_report(folder, [], drifted).read_text(encoding="utf-8")
    assert "<script" not in page
    assert "<b>run" not in page
    assert page.count("&lt;script&gt;alert(") == 5  # prompt, answer, and the three of all figures
    assert "1.00 → 2.00, 2.0 standard errors" in page
    verdict = str(escape(summary["diagnostics"]["verdict"]))
    assert page.index(verdict) < page.index("<li>") < page.index("<img")
