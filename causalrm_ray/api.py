"""Reward models from Python, by scikit-learn's conventions.

X, y (nan: no feedback) -> propensity -> noise rates -> the method's scorer -> P(r* = 1 | x), diagnostics
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from pydantic import TypeAdapter, ValidationError
from safetensors.torch import load_file, save_file
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.metrics import accuracy_score
from sklearn.utils import check_random_state
from sklearn.utils.validation import (
    check_is_fitted,
    validate_data,  # pyrefly: ignore[missing-module-attribute]  # stubs older than 1.6
)
from torch import Tensor

from causalrm_ray.checkpoint import MANIFEST, atomic_folder, read_json, verify_folder, write_json
from causalrm_ray.config.benchmark import HeadConfig
from causalrm_ray.data.collate import FeatureRows
from causalrm_ray.data.columns import as_vector, check_rows_match, encode_labels, plain
from causalrm_ray.estimators.core.task import Observations
from causalrm_ray.estimators.core.training import FitSettings, predict
from causalrm_ray.estimators.diagnostics.advice import advise
from causalrm_ray.estimators.diagnostics.diagnose import FitDiagnostics, diagnose_fit
from causalrm_ray.estimators.diagnostics.intervals import rate_ends
from causalrm_ray.estimators.given import held_out, judged_of, propensity_of, strata_of
from causalrm_ray.estimators.nuisances.level import LevelReport
from causalrm_ray.estimators.nuisances.propensity import cross_fit
from causalrm_ray.estimators.pipeline import RewardFits, fit_reward_models
from causalrm_ray.models.scorers.heads import FeatureScorer, centre_and_scale
from causalrm_ray.models.scorers.saved_heads import describe, rebuild
from causalrm_ray.types import HeadKind, NoiseEstimator, NoiseRates

_DEFAULT = HeadConfig()
MODEL, TENSORS = "model.json", "model.safetensors"


@dataclass(frozen=True)
class Diagnostics(FitDiagnostics):
    """Diagnostics of a fit, and `warnings`: sentences on what is weak in it, each with a value and a remedy."""

    warnings: tuple[str, ...]


class RewardEstimator(ClassifierMixin, BaseEstimator):
    """A model of P(r* = 1 | x), whether a user likes an answer, from feedback that is partial, selected and noisy.

    `X` [N, D] are features of all answers that were shown, such as embeddings; `y` [N] is the feedback: 1, 0, and nan (None,
    pd.NA) where none was given. Any two labels will do; the greater is the positive one.

    Parameters
    ----------
    method: estimator by name or import path "package.module:object" (causalrm_ray.registry.ESTIMATORS). "auto" models how
        selection works; "causalrm_dr" and "causalrm_ips" are the paper's (arXiv 2603.18736); "naive" corrects nothing.
    kind: "mlp", "linear", or "boosting": gradient-boosted trees, for "naive", "ips", "snips", "two_stage" and "auto"; None is
        "mlp", and for "two_stage" and "auto" whichever of mlp and boosting predicts held-out feedback better.
    hidden, dropout, lr, weight_decay, batch_size, epochs, patience: the head and its training, of propensity and reward models.
        Ensembles ("auto", "latent", "two_stage", "..._stable") have sizes and schedules of their own.
    clip: lowest propensity used in a weight, in (0, 1); None: a quarter of the share of rows with feedback, and 0.1 at most.
    rho: known noise rates (rho_01, rho_10) = (P(r = 0 | r* = 1), P(r = 1 | r* = 0)); None estimates them.
    noise_rates: how they are estimated: "curve" of the labels along a proxy's ranks, or the paper's "anchors".
    random_state: seed; the same seed and data give the same model.

    Attributes
    ----------
    classes_ [2], n_features_in_, feature_names_in_ (X a DataFrame); noise_rates_: NoiseRates used; propensity_ [N] in [clip, 1],
    P(o = 1 | x) of the training rows, out of fold; strata_: names of the groups that `traits` made, () without;
    diagnostics_: Diagnostics, with `.warnings`; level_: LevelReport on the level that `clean` set, None without;
    scorer_: the torch module, logits of standardised features.
    """

    n_features_in_: int
    feature_names_in_: np.ndarray

    def __init__(
        self,
        method: str = "auto",
        *,
        kind: HeadKind | None = _DEFAULT.kind,
        hidden: Sequence[int] = _DEFAULT.hidden,
        dropout: float = _DEFAULT.dropout,
        lr: float = _DEFAULT.lr,
        weight_decay: float = _DEFAULT.weight_decay,
        batch_size: int = _DEFAULT.batch_size,
        epochs: int = _DEFAULT.epochs,
        patience: int = _DEFAULT.patience,
        clip: float | None = _DEFAULT.clip,
        rho: tuple[float, float] | None = None,
        noise_rates: NoiseEstimator = "curve",
        random_state: int | np.random.RandomState | None = 0,
    ) -> None:
        self.method = method
        self.kind = kind
        self.hidden = hidden
        self.dropout = dropout
        self.lr = lr
        self.weight_decay = weight_decay
        self.batch_size = batch_size
        self.epochs = epochs
        self.patience = patience
        self.clip = clip
        self.rho = rho
        self.noise_rates = noise_rates
        self.random_state = random_state

    def fit(self, X: Any, y: Any, *, traits: Any = None, propensity: Any = None, clean: Any = None) -> RewardEstimator:
        """Fit on all answers that were shown, those without feedback too.

        `traits` are observed traits of the rows on which selection may depend: a DataFrame, a mapping of columns, or one column
        of strings. `propensity` [N] in (0, 1] is P(o = 1 | x), if it is known; else it is fitted, cross-fitted and calibrated.
        `clean` [N] holds r*, a label of y, of a few rows, 100 to 400, that were drawn at random from all and judged with care,
        say by raters; nan elsewhere. It sets the level of the predictions (`level_`); feedback on these rows counts as before.
        Raises ValueError that names the argument, the rule and the value.
        """
        head, seed = self._head(), self._seed()
        features, labels = self._rows(X, reset=True), as_vector("y", y)
        given = ~pd.isna(labels)
        check_rows_match(X=len(features), y=len(labels))
        self.classes_, r = encode_labels(labels, given)
        observations = Observations(torch.from_numpy(given).float(), torch.from_numpy(r))
        self._centre, self._scale = centre_and_scale(features)
        inputs = FeatureRows(self._standardise(features))
        make_scorer = partial(FeatureScorer, features.shape[1], head.widths, head.dropout)
        settings = FitSettings(head.epochs, head.lr, head.batch_size, head.patience, head.weight_decay, seed)
        strata, self.strata_ = strata_of(traits, observations)
        judged = judged_of(clean, self.classes_, len(features))
        cross = partial(cross_fit, make_scorer, inputs, settings=settings)
        prob, doubts = propensity_of(propensity, observations.o, cross, head.clip, seed)
        fits = fit_reward_models(
            make_scorer,
            inputs,
            observations,
            prob,
            (self.method,),
            settings,
            rates=None if self.rho is None else NoiseRates(*self.rho),
            noise_rates=self.noise_rates,
            judged=judged,
            heldout=held_out(observations, seed),
            strata=strata,
            head=head.kind,
        )
        fitted = fits.fits[self.method]
        self.scorer_, self.noise_rates_, self.propensity_ = fitted.scorer.eval(), fits.rates, prob.numpy()
        self.level_ = fits.level.get(self.method)
        logit = predict(fitted.scorer, inputs, fits.heldout) if fitted.opinion is None else fitted.opinion[fits.heldout]
        found = diagnose_fit(fits, self.method, observations, prob, logit, seed=seed, strata=strata)
        self.diagnostics_ = _with_warnings(found, fits, doubts)
        return self

    def predict_proba(self, X: Any) -> np.ndarray:
        """P(r* = 0 | x) and P(r* = 1 | x) [N, 2] of the rows `X` [N, D]."""
        check_is_fitted(self)
        features = self._rows(X, reset=False)
        positive = torch.sigmoid(predict(self.scorer_, FeatureRows(self._standardise(features))).double()).numpy()
        return np.stack([1 - positive, positive], axis=1)

    def predict(self, X: Any) -> np.ndarray:
        """The likelier label [N] of the rows `X` [N, D], one of classes_."""
        place = self.predict_proba(X).argmax(axis=1)
        return self.classes_[place]

    def score(self, X: Any, y: Any, sample_weight: Any = None) -> float:
        """Accuracy on the rows of `X` [N, D] that have feedback in `y` [N]: of noisy, selected labels, as the log has them."""
        labels = as_vector("y", y)
        given = ~pd.isna(labels)
        weight = None if sample_weight is None else np.asarray(sample_weight)[given]
        return float(accuracy_score(plain(labels[given]), self.predict(X)[given], sample_weight=weight))

    def save(self, path: str | Path) -> None:
        """Write the fitted model as a folder of JSON and safetensors with a manifest of hashes; all of it or nothing.

        A model that was saved there before is replaced. Raises ValueError for a folder with anything else in it.
        """
        check_is_fitted(self)
        others = {file.name for file in Path(path).iterdir()} - {MODEL, TENSORS, MANIFEST} if Path(path).is_dir() else set()
        if others or Path(path).is_file():
            raise ValueError(f"path must be a new folder or one of a saved model, got {path} with {sorted(others) or 'a file'}")
        if not (self.random_state is None or isinstance(self.random_state, Integral)):
            raise ValueError(f"random_state must be an int or None in a model that is saved, got {self.random_state!r}")
        record = {
            "params": {name: _as_json(value) for name, value in self.get_params().items()},
            "scorer": describe(self.scorer_),
            "classes": {"values": self.classes_.tolist(), "dtype": self.classes_.dtype.str},
            "feature_names": [*getattr(self, "feature_names_in_", ())],
            "strata": self.strata_,
            "noise_rates": asdict(self.noise_rates_),
            "level": None if self.level_ is None else asdict(self.level_),
            "diagnostics": TypeAdapter(Diagnostics).dump_python(self.diagnostics_, mode="json"),
        }
        tensors = {f"scorer.{name}": value.contiguous() for name, value in self.scorer_.state_dict().items()}
        tensors |= {"centre": self._centre, "scale": self._scale, "propensity": torch.from_numpy(self.propensity_)}
        with atomic_folder(Path(path)) as folder:
            write_json(folder / MODEL, record)
            save_file(tensors, folder / TENSORS)

    @classmethod
    def load(cls, path: str | Path) -> RewardEstimator:
        """The model that `save` wrote. Raises CheckpointError, a ValueError, for a folder that is incomplete or altered."""
        folder = Path(path)
        verify_folder(folder)
        record, tensors = read_json(folder / MODEL), load_file(folder / TENSORS)
        params = {name: tuple(value) if isinstance(value, list) else value for name, value in record["params"].items()}
        model = cls().set_params(**params)
        with torch.random.fork_rng(devices=[]):  # what is drawn here is overwritten: the caller's numbers stay as they are
            model.scorer_ = rebuild(record["scorer"])
        model.scorer_.load_state_dict({name[7:]: value for name, value in tensors.items() if name.startswith("scorer.")})
        model._centre, model._scale, model.propensity_ = tensors["centre"], tensors["scale"], tensors["propensity"].numpy()
        model.classes_ = np.array(record["classes"]["values"], dtype=record["classes"]["dtype"])
        model.n_features_in_ = len(model._centre)
        if record["feature_names"]:
            model.feature_names_in_ = np.array(record["feature_names"], dtype=object)
        model.strata_, model.noise_rates_ = tuple(record["strata"]), NoiseRates(**record["noise_rates"])
        model.level_ = TypeAdapter(LevelReport | None).validate_python(record.get("level"))  # none in a folder of before
        model.diagnostics_ = TypeAdapter(Diagnostics).validate_python(record["diagnostics"])
        return model

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()  # pyrefly: ignore[missing-attribute]  # stubs older than 1.6
        tags.classifier_tags.multi_class = False
        return tags

    def _head(self) -> HeadConfig:
        """The parameters that HeadConfig knows, by its rules."""
        given = {name: getattr(self, name) for name in HeadConfig.model_fields if hasattr(self, name)}
        try:
            return HeadConfig(**{name: value.item() if isinstance(value, np.generic) else value for name, value in given.items()})
        except ValidationError as error:
            first = error.errors()[0]
            raise ValueError(f"{first['loc'][0]}: {first['msg']}, got {first['input']!r}") from error

    def _seed(self) -> int:
        if isinstance(self.random_state, Integral):
            return int(self.random_state)
        return int(check_random_state(self.random_state).randint(2**31))

    def _rows(self, X: Any, reset: bool) -> Tensor:
        array = X.numpy(force=True) if isinstance(X, Tensor) else X
        return torch.from_numpy(np.array(validate_data(self, array, reset=reset, dtype=np.float32), order="C"))

    def _standardise(self, features: Tensor) -> Tensor:
        return (features - self._centre) / self._scale


def _as_json(value: Any) -> Any:
    """A parameter's NumPy scalar or array as what JSON holds; anything else as it is."""
    return value.tolist() if isinstance(value, np.generic | np.ndarray) else value


def _with_warnings(found: FitDiagnostics, fits: RewardFits, doubts: Sequence[str]) -> Diagnostics:
    noise = fits.noise
    rates = rate_ends(fits.rates, noise, found.intervals)
    sentences = [*advise(asdict(found), {"warnings": [*doubts]}, rates, bool(fits.level)), *(noise.warnings if noise else ())]
    sentences += [sentence for report in fits.level.values() for sentence in report.warnings]
    names = {field.name: getattr(found, field.name) for field in fields(found)}
    # What a configuration calls reward.clip is the parameter clip here.
    return Diagnostics(**names, warnings=tuple(re.sub(r"\breward\.(?=[a-z])", "", sentence) for sentence in sentences))
