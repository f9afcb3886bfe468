"""Probes: light heads over frozen features, and features to compare vectors with.

No feature here ever sees a label; what is fitted on labels (a head, and the scaling before it) is fitted on the
training folds alone.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
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

Matrix = npt.NDArray[np.float64]  # [users, features]
Labels = npt.NDArray[np.int64]  # [users], 0 or 1
Integers = npt.NDArray[np.int64]


class Logistic(ClassifierMixin, BaseEstimator):  # type: ignore[misc]  # scikit-learn has no types
    """Logistic regression that chooses C among 0.1, 0.3 and 1 by the AUC of three folds of its training rows; 0.3 where
    one label has fewer than six."""

    def fit(self, features: Matrix, labels: Labels) -> Logistic:
        few = np.bincount(labels, minlength=2).min() < 6
        # Not LogisticRegressionCV: what it takes differs between the versions that pyproject.toml allows.
        chosen = GridSearchCV(LogisticRegression(max_iter=1000), {"C": [0.1, 0.3, 1.0]}, scoring="roc_auc", cv=3)
        self.fitted_ = (LogisticRegression(C=0.3, max_iter=1000) if few else chosen).fit(features, labels)
        self.classes_ = self.fitted_.classes_
        return self

    def predict_proba(self, features: Matrix) -> Matrix:
        found: Matrix = self.fitted_.predict_proba(features)
        return found


# A few hundred labels over some two hundred features: the heads are held back more than scikit-learn's defaults do. The
# same for all features, so that none is favoured. The logistic one reads features at the lengths that they have among
# each other (`one_length`): the last of 64 singular directions, blown up to the first one's, is noise, and cost TF-IDF
# and SVD 0.03 of AUC. How much it is held back, it chooses by three folds of what it learns from: features of many
# places want less of it.
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


def folds_of(labels: Labels, times: Integers | None, folds: int, seed: int) -> Iterator[tuple[Integers, Integers]]:
    """(training rows, test rows) of each fold that counts: one with both labels among either.

    Args:
        times: of each label, any unit. With them training comes before testing: fold n of `folds` tests on the n+1-th
            of folds + 1 stretches of time, and trains on all before. None: stratified folds, shuffled by the seed.
    """
    for train, test in _all_folds(labels, times, folds, seed):
        if len(set(labels[train])) == len(set(labels[test])) == 2:
            yield train, test


def _all_folds(labels: Labels, times: Integers | None, folds: int, seed: int) -> Iterator[tuple[Integers, Integers]]:
    if times is None:
        yield from StratifiedKFold(folds, shuffle=True, random_state=seed).split(labels, labels)
        return
    order = np.argsort(times, kind="stable")
    for train, test in TimeSeriesSplit(folds).split(order):
        # Labels of one moment are not told apart: none of the test's own moment is learnt from.
        yield order[train][times[order[train]] < times[order[test[0]]]], order[test]


def probe(
    features: Matrix, labels: Labels, head: str, *, folds: int, seeds: int, times: Integers | None = None
) -> dict[str, list[float]]:
    """How well a head on frozen features ranks users by their label.

    Args:
        head: a key of HEADS.
        times: as in `folds_of`.

    Returns:
        `auc` and `average_precision`: of each seed the mean over its folds that count. With times, where all seeds have
        the same folds: of each fold that counts the mean over the seeds. Nothing where no fold counts.
    """
    features = one_length(features)  # looks at no label
    found = []
    for seed in range(1 if times is not None and head in SEEDLESS else seeds):
        of_folds = []
        for train, test in folds_of(labels, times, folds, seed):
            # So small a fit gains nothing from threads, and on a busy machine waits ten times as long for them.
            with threadpool_limits(1), warnings.catch_warnings():
                warnings.simplefilter("ignore", ConvergenceWarning)  # that few passes are what holds an MLP back
                fitted = HEADS[head](seed).fit(features[train], labels[train])
            scores = fitted.predict_proba(features[test])[:, 1]
            of_folds.append((roc_auc_score(labels[test], scores), average_precision_score(labels[test], scores)))
        if of_folds:
            found.append(of_folds)
    means = [np.mean(each, axis=0) for each in (found if times is None else zip(*found, strict=True))]
    return {name: [float(mean[place]) for mean in means] for place, name in enumerate(("auc", "average_precision"))}


def tfidf_svd(counts: sp.csr_matrix, width: int = 64) -> Matrix:
    """Counts → TF-IDF (rows of length 1) → the first `width` singular directions, fewer where there are fewer.

    Args:
        counts: [users, items]; a user without an item gets zeros.

    Returns:
        float64 [users, width]: the rows times the directions.
    """
    width = min(width, *(size - 1 for size in counts.shape))
    if width < 1:
        return np.zeros((counts.shape[0], 1))
    weighted = TfidfTransformer(sublinear_tf=True).fit_transform(counts)
    found: Matrix = TruncatedSVD(width, random_state=0).fit_transform(weighted)
    return found


def standardised(numbers: Matrix) -> Matrix:
    """Numbers of different units, each centred and divided by its spread; one that is the same for all is 0."""
    found: Matrix = StandardScaler().fit_transform(numbers)
    return found


def one_length(features: Matrix) -> Matrix:
    """The features centred, and all divided by one number: the mean squared length of a row is 1."""
    centred = features - features.mean(axis=0)
    found: Matrix = centred / max(float(np.sqrt((centred**2).sum(axis=1).mean())), 1e-12)
    return found
