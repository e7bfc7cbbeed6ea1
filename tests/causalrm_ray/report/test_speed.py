"""Ratios by hand numbers."""

from __future__ import annotations

from pathlib import Path

import pytest

from causalrm_ray.report.speed import Pair, draw_figures, figure, speed, sync_figure, uncovered


def test_speed_is_the_median_of_the_pairs_ratios_not_the_ratio_of_the_medians() -> None:
    found = speed("learner", "a", [Pair(1.0, 2.0), Pair(2.0, 1.0), Pair(4.0, 12.0)], 0.9, tokens=7.0)
    assert (found.value, found.low, found.high, found.count) == (2.0, 0.5, 3.0, 3)
    assert found.details == {"ours_s": 2.0, "other_s": 2.0, "tokens": 7.0}
    assert found.met
    assert not speed("learner", "a", [Pair(2.0, 1.0)], 0.9).met


def test_a_sync_may_take_a_copy_and_a_third_and_half_a_second() -> None:
    found = sync_figure("a", [Pair(1.8, 1.0), Pair(0.9, 1.0)], 4e9)  # 1.3 * 1 + 0.5 = 1.8 s
    assert (found.low, found.high) == (0.5, 1.0)
    assert found.value == 0.75
    assert found.met
    assert found.details["gb_per_s"] == pytest.approx(4 / 1.35)
    assert found.details["copies"] == pytest.approx(1.35)
    assert not sync_figure("a", [Pair(1.81, 1.0)], 1.0).met


def test_an_upper_bound_is_met_up_to_itself() -> None:
    assert figure("driver", "a", [0.05], 0.05, at_least=False).met
    assert not figure("driver", "a", [0.051], 0.05, at_least=False).met
    with pytest.raises(ValueError, match="driver must have at least one measurement, got none"):
        figure("driver", "a", [], 0.05, at_least=False)


def test_uncovered_counts_what_no_span_holds_once() -> None:
    spans = [(12.0, 14.0), (9.0, 11.0), (13.0, 15.0), (13.5, 13.6), (19.0, 25.0), (30.0, 40.0)]
    assert uncovered(spans, 10.0, 20.0) == pytest.approx(1 - (1 + 3 + 1) / 10)
    assert uncovered([], 0.0, 2.0) == 1.0
    assert uncovered([(0.0, 5.0)], 1.0, 2.0) == 0.0
    with pytest.raises(ValueError, match=r"end must be after begin = 2\.0, got 2\.0"):
        uncovered([], 2.0, 2.0)


def test_every_figure_is_drawn_even_one_that_shrank(tmp_path: Path) -> None:
    figures = [figure("memory", "a", [-0.01], 0.01, at_least=False), figure("trl", "a", [2.0, 3.0], 2.0, at_least=True)]
    draw_figures(figures, tmp_path / "perf.png")
    assert (tmp_path / "perf.png").read_bytes()[:4] == b"\x89PNG"
