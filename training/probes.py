"""Probes: light heads on frozen features, and baseline features to compare vectors with.

No feature here ever sees a label. Heads, and the scaling inside them, are fitted on the training folds alone.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import scipy.sparse as sp
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.decomposition import TruncatedSVD
from sklearn.dummy import DummyClassifier
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.exceptions import ConvergenceWarning
from sklearn.feature_extraction.text import TfidfTransformer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score, roc_auc_score
from sklearn.model_selection import GridSearchCV, StratifiedKFold, TimeSeriesSplit
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

from training.arrays import Float64, Int64

Matrix = Float64  # [users, features]
Labels = Int64  # [users], 0 or 1


class Logistic(ClassifierMixin, BaseEstimator):  # type: ignore[misc]  # scikit-learn has no types
    """Logistic regression with C chosen from 0.1, 0.3 and 1 by AUC, in 3-fold cross-validation on its training rows;
    0.3 if a label has fewer than six."""

    def fit(self, features: Matrix, labels: Labels) -> Logistic:
        few = np.bincount(labels, minlength=2).min() < 6
        # Not LogisticRegressionCV: its arguments differ between the versions that pyproject.toml allows.
        chosen = GridSearchCV(LogisticRegression(max_iter=1000), {"C": [0.1, 0.3, 1.0]}, scoring="roc_auc", cv=3)
        self.fitted_ = (LogisticRegression(C=0.3, max_iter=1000) if few else chosen).fit(features, labels)
        self.classes_ = self.fitted_.classes_
        return self

    def predict_proba(self, features: Matrix) -> Matrix:
        found: Matrix = self.fitted_.predict_proba(features)
        return found


# A few hundred labels on some two hundred features: the heads are regularised more than by scikit-learn's defaults, and
# alike for all feature sets, so that none is favoured. The logistic head keeps the features' relative scales
# (`one_length`): the last of 64 singular directions, scaled up to the first one's variance, is noise, and cost TF-IDF +
# SVD 0.03 of AUC. It chooses its own regularisation, because features of many dimensions need less of it.
HEADS: dict[str, Callable[[int], Any]] = {
    "majority": lambda seed: DummyClassifier(strategy="prior"),
    "logistic": lambda seed: Logistic(),
    "boosting": lambda seed: HistGradientBoostingClassifier(
        max_iter=60, learning_rate=0.05, max_leaf_nodes=8, min_samples_leaf=10, max_features=0.3, random_state=seed
    ),
    "mlp": lambda seed: make_pipeline(
        StandardScaler(),
        MLPClassifier((32,), alpha=1.0, learning_rate_init=0.003, max_iter=30, random_state=seed),
    ),
}
SEEDLESS = ("majority", "logistic")


def folds_of(labels: Labels, times: Int64 | None, folds: int, seed: int) -> Iterator[tuple[Int64, Int64]]:
    """(training rows, test rows) of each fold that counts: one with both labels in training and in test.

    Args:
        times: of each label, any unit. With them, training precedes testing: fold n of `folds` tests on the n+1-th of
            folds + 1 equal slices in order of time, and trains on all before. None: stratified folds, shuffled by seed.
    """
    for train, test in _all_folds(labels, times, folds, seed):
        if len(set(labels[train])) == len(set(labels[test])) == 2:
            yield train, test


def _all_folds(labels: Labels, times: Int64 | None, folds: int, seed: int) -> Iterator[tuple[Int64, Int64]]:
    if times is None:
        yield from StratifiedKFold(folds, shuffle=True, random_state=seed).split(labels, labels)
        return
    order = np.argsort(times, kind="stable")
    for train, test in TimeSeriesSplit(folds).split(order):
        # Labels at the same time as the first test label have no order: do not train on them.
        yield order[train][times[order[train]] < times[order[test[0]]]], order[test]


def probe(
    features: Matrix, labels: Labels, head: str, *, folds: int, seeds: int, times: Int64 | None = None
) -> dict[str, list[float]]:
    """How well a head on frozen features ranks users by their label.

    Args:
        head: a key of HEADS.
        times: as in `folds_of`.

    Returns:
        `auc` and `average_precision`: for each seed the mean over its folds that count. With times, where all seeds
        have the same folds: for each fold that counts the mean over the seeds. Empty lists if no fold counts.
    """
    features = one_length(features)  # looks at no label
    by_seed = []
    for seed in range(1 if times is not None and head in SEEDLESS else seeds):
        of_folds = []
        for train, test in folds_of(labels, times, folds, seed):
            # So small a fit gains nothing from threads, and on a busy machine takes ten times as long with them.
            with threadpool_limits(1), warnings.catch_warnings():
                warnings.simplefilter("ignore", ConvergenceWarning)  # stopping early is the MLP's regularisation
                fitted = HEADS[head](seed).fit(features[train], labels[train])
            scores = fitted.predict_proba(features[test])[:, 1]
            of_folds.append((roc_auc_score(labels[test], scores), average_precision_score(labels[test], scores)))
        if of_folds:
            by_seed.append(of_folds)
    means = [np.mean(each, axis=0) for each in (by_seed if times is None else zip(*by_seed, strict=True))]
    return {name: [float(mean[place]) for mean in means] for place, name in enumerate(("auc", "average_precision"))}


def tfidf_svd(counts: sp.csr_matrix, width: int = 64) -> Matrix:
    """Counts → TF-IDF (rows of norm 1) → projection on the first `width` singular directions (or all, if fewer).

    Args:
        counts: [users, items]; a user without items gets zeros.

    Returns:
        float64 [users, width].
    """
    width = min(width, *(size - 1 for size in counts.shape))
    if width < 1:
        return np.zeros((counts.shape[0], 1))
    weighted = TfidfTransformer(sublinear_tf=True).fit_transform(counts)
    found: Matrix = TruncatedSVD(width, random_state=0).fit_transform(weighted)
    return found


def standardised(numbers: Matrix) -> Matrix:
    """Features of different units, each centred and divided by its standard deviation; a constant one becomes 0."""
    found: Matrix = StandardScaler().fit_transform(numbers)
    return found


def one_length(features: Matrix) -> Matrix:
    """The features, centred and all divided by one number, so that the mean squared norm of a row is 1."""
    centred = features - features.mean(axis=0)
    found: Matrix = centred / max(float(np.sqrt((centred**2).sum(axis=1).mean())), 1e-12)
    return found
