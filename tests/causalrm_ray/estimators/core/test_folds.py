"""Folds of clusters: whole ones, as many rows and labels in each fold as their sizes allow."""

from __future__ import annotations

import pytest
import torch

from causalrm_ray.errors import InputError
from causalrm_ray.estimators.core.folds import fold_of


def test_rows_of_a_cluster_share_a_fold_and_folds_are_about_as_large() -> None:
    cluster = torch.randint(200, (3000,), generator=torch.Generator().manual_seed(0)) * 7919
    labelled = torch.rand(3000, generator=torch.Generator().manual_seed(1)) < 0.2
    fold = fold_of(3000, 5, 0, cluster, labelled)
    for one in cluster.unique():
        assert len(fold[cluster == one].unique()) == 1
    assert (torch.bincount(fold[labelled]).float() / labelled.sum() - 0.2).abs().max() < 0.02
    assert (torch.bincount(fold).float() / 3000 - 0.2).abs().max() < 0.05
    assert torch.equal(fold, fold_of(3000, 5, 0, cluster, labelled))
    assert not torch.equal(fold, fold_of(3000, 5, 1, cluster, labelled))


def test_clusters_of_one_row_make_folds_of_equally_many_rows() -> None:
    fold = fold_of(103, 5, 0, torch.arange(103))
    assert sorted(torch.bincount(fold).tolist()) == [20, 20, 21, 21, 21]


def test_too_few_clusters_are_named() -> None:
    with pytest.raises(InputError, match="5 folds need at least 5 of these, got 3 over 90 rows"):
        fold_of(90, 5, 0, torch.arange(90) % 3)
