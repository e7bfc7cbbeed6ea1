"""The Python API: the README's snippet on a log of known truth, scikit-learn's conventions, saved models."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.base import clone
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import GridSearchCV, KFold, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import check_estimator

from causalrm_ray import RewardEstimator
from causalrm_ray.checkpoint import CheckpointError
from causalrm_ray.data.simulate import SimulatedLog, simulate

FAST = {"method": "causalrm_ips", "rho": (0.2, 0.1), "epochs": 5, "lr": 0.01}


def world(rows: int = 3000, alpha: float = 0.3, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray, SimulatedLog]:
    """Features, feedback with nan, a trait, and the log whose truth is known: the opinion decides who gives feedback."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 6, generator=generator)
    utility = x[:, 0] + 0.7 * x[:, 1] * x[:, 2]
    levels = torch.bucketize(utility, torch.tensor([-1.0, -0.3, 0.3, 1.0])).float()
    log = simulate(levels, x, alpha=alpha, scenario=1, selection="label", seed=seed)
    y = torch.where(log.o == 1, log.r, torch.nan)
    style = np.where(x[:, 5] > 0, "long", "short")
    return x.numpy(), y.numpy(), style, log


def test_the_readmes_snippet_beats_naive_under_selection_by_the_opinion(tmp_path: Path) -> None:
    X, y, style, log = world(6000)
    X_new, _, _, unseen = world(2000, seed=1)
    model = RewardEstimator(method="auto").fit(X, y, traits=style)
    naive = RewardEstimator(method="naive", rho=(0.2, 0.1)).fit(X, y)
    prob = model.predict_proba(X_new)
    assert prob.shape == (2000, 2)
    np.testing.assert_allclose(prob.sum(1), 1)
    ours, theirs = (roc_auc_score(unseen.preference, one.predict_proba(X_new)[:, 1]) for one in (model, naive))
    assert ours > max(theirs + 0.01, 0.85)
    assert 0 <= model.noise_rates_.rho_01 < 0.5
    assert model.propensity_.shape == (6000,)
    assert roc_auc_score(log.o, model.propensity_) > 0.55
    assert model.strata_ == ("trait=long", "trait=short") or model.strata_ == ("trait=short", "trait=long")
    assert all(isinstance(sentence, str) and "reward." not in sentence for sentence in model.diagnostics_.warnings)
    model.save(tmp_path / "reward")
    assert np.array_equal(RewardEstimator.load(tmp_path / "reward").predict_proba(X_new), prob)


def test_importing_the_package_loads_no_torch() -> None:
    program = "import sys, causalrm_ray; print('torch' in sys.modules, 'RewardEstimator' in dir(causalrm_ray))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True"]


def test_numpy_pandas_and_torch_give_the_same_to_the_bit() -> None:
    X, y, style, _ = world(600)
    votes = pd.Series([pd.NA if np.isnan(vote) else int(vote) for vote in y], dtype="Int64")
    columns = [f"x{number}" for number in range(X.shape[1])]
    given = [
        (X, y, {"trait": style}),
        (torch.from_numpy(X), torch.from_numpy(y), style),
        (pd.DataFrame(X, columns=columns), votes, pd.DataFrame({"trait": style})),
        (X.tolist(), [None if np.isnan(vote) else bool(vote) for vote in y], pd.Series(style, name="trait")),
    ]
    models = [RewardEstimator(**FAST).fit(X, y, traits=traits) for X, y, traits in given]
    probs = [model.predict_proba(X) for model, (X, _, _) in zip(models, given, strict=True)]
    for model, prob in zip(models, probs, strict=True):
        assert np.array_equal(prob, probs[0])
        assert np.array_equal(model.propensity_, models[0].propensity_)
        assert model.diagnostics_ == models[0].diagnostics_
        assert model.strata_ == models[0].strata_
    assert list(models[2].feature_names_in_) == columns
    assert models[3].classes_.tolist() == [False, True]
    with pytest.raises(ValueError, match="feature names should match"):
        models[2].predict(pd.DataFrame(X, columns=columns[::-1]))


@pytest.mark.parametrize("method", ["naive", "causalrm_dr", "mt_dr", "co_teaching", "auto", "causalrm_dr_stable"])
def test_a_saved_model_comes_back_as_it_was(method: str, tmp_path: Path) -> None:
    X, y, style, _ = world(400)
    frame = pd.DataFrame(X, columns=list("abcdef"))
    model = RewardEstimator(method=method, rho=(0.2, 0.1), epochs=2, hidden=(8,), batch_size=np.int64(64))
    model.fit(frame, y, traits={"style": style}).save(tmp_path / "model")
    state = torch.random.get_rng_state()
    again = RewardEstimator.load(tmp_path / "model")
    assert torch.equal(torch.random.get_rng_state(), state)
    assert again.get_params() == model.get_params()
    assert np.array_equal(again.predict_proba(frame), model.predict_proba(frame))
    assert np.array_equal(again.predict(frame), model.predict(frame))
    assert again.diagnostics_ == model.diagnostics_
    assert again.noise_rates_ == model.noise_rates_
    assert np.array_equal(again.propensity_, model.propensity_)
    assert (again.strata_, list(again.feature_names_in_)) == (model.strata_, list("abcdef"))
    assert {path.suffix for path in (tmp_path / "model").iterdir()} == {".json", ".safetensors"}
    again.save(tmp_path / "model")  # in its own place
    assert RewardEstimator.load(tmp_path / "model").get_params() == model.get_params()


def test_saving_never_replaces_what_is_no_saved_model(tmp_path: Path) -> None:
    X, y, _, _ = world(400)
    model = RewardEstimator(method="naive", epochs=1, hidden=(8,)).fit(X, y)
    (tmp_path / "precious.txt").write_text("mine")
    for path, found in ((tmp_path, "precious.txt"), (tmp_path / "precious.txt", "a file")):
        with pytest.raises(ValueError, match=f"path must be a new folder or one of a saved model, got .*{found}"):
            model.save(path)
    assert (tmp_path / "precious.txt").read_text() == "mine"


def test_a_folder_that_was_altered_is_refused(tmp_path: Path) -> None:
    X, y, _, _ = world(300)
    RewardEstimator(**FAST).fit(X, y).save(tmp_path / "model")
    file = tmp_path / "model" / "model.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"classes": []}))
    with pytest.raises(CheckpointError, match=r"model\.json does not match its hash"):
        RewardEstimator.load(tmp_path / "model")
    with pytest.raises(CheckpointError, match=r"has no manifest\.json"):
        RewardEstimator.load(tmp_path)


def test_given_propensities_replace_the_fitted_ones_and_are_clipped() -> None:
    X, y, _, log = world(600)
    model = RewardEstimator(**FAST, clip=0.2).fit(X, y, propensity=pd.Series(log.propensity.numpy()))
    assert np.array_equal(model.propensity_, log.propensity.clamp(min=0.2).numpy())


def test_known_rates_are_used_and_the_papers_anchors_can_be_chosen() -> None:
    X, y, _, _ = world(2000, alpha=0.8)
    assert RewardEstimator(**FAST).fit(X, y).noise_rates_.rho_01 == 0.2
    curve, anchors = (
        RewardEstimator(**FAST | {"rho": None, "noise_rates": name}).fit(X, y).noise_rates_ for name in ("curve", "anchors")
    )
    assert curve != anchors


def test_a_log_without_missing_feedback_is_fitted_and_warned_about() -> None:
    X, _, _, log = world(400)
    model = RewardEstimator(**FAST).fit(X, log.preference.numpy())
    assert (model.propensity_ == 1).all()
    assert "All rows have feedback" in model.diagnostics_.warnings[0]


def test_it_works_in_pipelines_searches_and_cross_validation() -> None:
    X, y, _, log = world(400)
    pipeline = make_pipeline(StandardScaler(), RewardEstimator(**FAST)).fit(X, y)
    assert 0 <= pipeline.score(X, y) <= 1  # accuracy on the rows with feedback
    complete = log.preference.numpy()
    assert cross_val_score(RewardEstimator(**FAST), X, complete, cv=3, scoring="roc_auc").mean() > 0.7
    search = GridSearchCV(RewardEstimator(**FAST), {"lr": [1e-6, 0.01], "hidden": [(8,)]}, cv=KFold(2)).fit(X, y)
    assert search.best_params_["hidden"] == (8,)
    assert clone(search.best_estimator_).get_params() == {**RewardEstimator(**FAST).get_params(), **search.best_params_}


def test_the_same_seed_gives_the_same_model() -> None:
    X, y, _, _ = world(300)
    first, again, other = (RewardEstimator(**FAST, random_state=seed).fit(X, y).predict_proba(X) for seed in (3, 3, 4))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize("method", ["causalrm_ips", "two_stage"])
def test_a_few_judged_rows_set_the_level_and_are_kept_with_the_model(method: str, tmp_path: Path) -> None:
    X, y, _, log = world(400)
    clean = np.where(np.random.default_rng(0).random(400) < 0.5, log.preference.numpy(), np.nan)
    options = FAST | {"method": method}
    plain, model = (RewardEstimator(**options).fit(X, y, clean=given) for given in (None, clean))
    report = model.level_
    assert plain.level_ is None
    assert report is not None
    before, after = (one.predict_proba(X)[:, 1] for one in (plain, model))
    assert np.log(after / (1 - after)) == pytest.approx(report.level(np.log(before / (1 - before))), abs=1e-3)
    assert abs(after.mean() - float(log.preference.mean())) < 3 * report.liked_stderr
    model.save(tmp_path / "model")
    again = RewardEstimator.load(tmp_path / "model")
    assert np.array_equal(again.predict_proba(X), model.predict_proba(X))
    assert again.level_ == report


def test_judged_rows_bear_the_labels_of_the_feedback() -> None:
    X, y, _, log = world(400)
    clean = np.where(np.arange(400) < 100, log.preference.numpy(), np.nan)
    votes, judged = ([None if np.isnan(one) else ("bad", "good")[int(one)] for one in column] for column in (y, clean))
    named = RewardEstimator(**FAST).fit(X, votes, clean=pd.Series(judged))
    assert named.level_ == RewardEstimator(**FAST).fit(X, y, clean=clean).level_


def test_what_judged_rows_leave_open_stands_among_the_warnings() -> None:
    X, y, _, log = world(600)
    clean = np.where(np.arange(600) < 20, log.preference.numpy(), np.nan)
    warnings = RewardEstimator(**FAST).fit(X, y, clean=clean).diagnostics_.warnings
    assert any(" rows were judged: the level rests on its prior" in sentence for sentence in warnings)


THIRD_PARTY = """
import torch
from causalrm_ray.estimators.core.task import Fitted
from causalrm_ray.estimators.core.training import Objective

class Tanh(torch.nn.Module):
    def __init__(self, scorer):
        super().__init__()
        self.scorer = scorer

    def forward(self, **batch):
        return 4 * torch.tanh(self.scorer(**batch))

class Plain:
    paper, needs, wrap = "-", frozenset(), staticmethod(lambda scorer: scorer)

    def fit(self, task):
        scorer, o, r = self.wrap(task.scorer()), task.observations.o, task.observations.r
        report = task.minimise(scorer, lambda rows: Objective(rows, lambda logit, index: o[index] * task.loss(logit, r[index])))
        return Fitted(scorer, report)

class Bounded(Plain):
    wrap = Tanh
"""


def test_an_estimator_of_another_package_is_named_by_its_import_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "other_estimators.py").write_text(THIRD_PARTY)
    monkeypatch.syspath_prepend(tmp_path)
    X, y, _, log = world(600)
    model = RewardEstimator(**FAST | {"method": "other_estimators:Plain", "epochs": 20}).fit(X, y)
    assert roc_auc_score(log.preference, model.predict_proba(X)[:, 1]) > 0.7
    model.save(tmp_path / "model")
    monkeypatch.setattr(sys, "path", sys.path[1:])
    again = RewardEstimator.load(tmp_path / "model")  # imports nothing
    assert np.array_equal(again.predict_proba(X), model.predict_proba(X))
    bounded = RewardEstimator(**FAST | {"method": "other_estimators:Bounded"}).fit(X, y)
    with pytest.raises(ValueError, match="a scorer of type Tanh cannot be saved"):
        bounded.save(tmp_path / "bounded")
    assert not (tmp_path / "bounded").exists()


@pytest.mark.parametrize(
    ("parameters", "given", "message"),
    [
        ({"method": "causal"}, {}, "method must be one of naive, .*, got 'causal'; did you mean 'causalrm_"),
        ({"lr": 0.0}, {}, "lr: Input should be greater than 0, got 0.0"),
        ({"hidden": (0,)}, {}, "hidden: Input should be greater than 0, got 0"),
        ({"clip": 1.0}, {}, "clip: Input should be less than 1, got 1.0"),
        ({"rho": (0.6, 0.5)}, {}, r"rho_01 \+ rho_10 must be below 1"),
        ({"noise_rates": "guess"}, {}, "noise_rates must be one of curve, anchors, got 'guess'"),
        (
            {},
            {"y": np.r_[np.ones(10), np.full(290, np.nan)]},
            r"y must hold two classes among the 10 labels given, got 1 class: \[1\.0\]",
        ),
        ({}, {"y": np.arange(300) % 3}, "Only binary classification is supported. The type of the target is multiclass"),
        ({}, {"y": np.ones(299)}, "rows must match, got .*'X': 300, 'y': 299"),
        ({}, {"propensity": np.zeros(300)}, r"propensity must be in \(0, 1\], got min=0"),
        ({}, {"propensity": np.ones(299)}, "rows must match, got .*'X': 300, 'propensity': 299"),
        ({}, {"clean": np.ones(299)}, "rows must match, got .*'X': 300, 'clean': 299"),
        ({}, {"clean": np.full(300, 3)}, r"clean must hold labels of y, \[0\.0, 1\.0\], and nan where no row was judged, got 3"),
        ({}, {"clean": np.full(300, np.nan)}, "clean must hold at least one label, got 300 rows without: leave it out"),
        ({}, {"traits": {"style": ["long"]}}, "rows must match, got .*'X': 300, 'style': 1"),
    ],
)
def test_errors_name_argument_rule_and_value(parameters: dict, given: dict, message: str) -> None:
    X, y, _, _ = world(300)
    with pytest.raises(ValueError, match=message):
        RewardEstimator(**FAST | {"rho": None} | parameters).fit(**{"X": X, "y": y} | given)


def test_scikit_learn_finds_its_conventions_kept() -> None:
    model = RewardEstimator(method="naive", rho=(0.0, 0.0), lr=0.02, epochs=30)
    check_estimator(model)
