from __future__ import annotations

import pytest

from causalrm_ray.rl.drift import drift_warnings


def steps(name: str, *values: float) -> list[dict[str, float]]:
    return [{name: value} for value in values]


def test_a_steady_run_has_no_warnings() -> None:
    rows = [{"entropy": 1.0 - 0.1 * step, "response_length": 10.0 + step, "kl_stopped": 0.0} for step in range(6)]
    assert drift_warnings(rows) == []


@pytest.mark.parametrize(("last", "warned"), [(0.31, False), (0.29, True)])
def test_entropy_below_its_share_of_the_start_gets_a_warning_with_both_values(last: float, warned: bool) -> None:
    found = drift_warnings(steps("entropy", 0.5, 1.0, 1.5, last, last, last))
    assert [sentence.split(":")[0] for sentence in found] == [f"Entropy fell from 1.00 to {last:.2f} nats per token"] * warned


@pytest.mark.parametrize(("last", "warned"), [(14.9, False), (15.1, True), (5.1, False), (4.9, True)])
def test_length_that_drifts_either_way_gets_a_warning(last: float, warned: bool) -> None:
    found = drift_warnings(steps("response_length", 10, 10, 10, 99, last, last, last))
    assert [sentence.split(" tokens")[0] for sentence in found] == [f"Answers went from 10 to {last:.0f}"] * warned


def test_fewer_than_two_windows_are_not_judged() -> None:
    assert drift_warnings(steps("entropy", 1.0, 1.0, 1.0, 0.0, 0.0)) == []
    assert drift_warnings([]) == []


def test_updates_that_mostly_end_early_get_a_warning() -> None:
    (found,) = drift_warnings(steps("kl_stopped", 1.0, 1.0, 0.0))
    assert found.startswith("67% of the steps ended early at learner.kl.stop")
    assert drift_warnings(steps("kl_stopped", 1.0, 0.0)) == []


@pytest.mark.parametrize(("staleness", "share", "warned"), [(0.0, 0.16, True), (0.0, 0.95, False), (0.5, 0.16, False)])
def test_a_low_effective_sample_size_under_the_newest_weights_is_warned_of(staleness: float, share: float, warned: bool) -> None:
    rows = [{"staleness": 0.0, "importance_weight_ess": 1.0}, {"staleness": staleness, "importance_weight_ess": share}]
    found = drift_warnings(rows)
    assert len(found) == warned
    assert all("importance weights was 16% of the tokens" in sentence for sentence in found)
