"""What classes of galaxies have to do with labels, with each other and with other quantities.

All functions take plain arrays: classes as numbers or names, class probabilities of shape (N, K),
latents of shape (N, d).  An unknown class or label is masked, NaN, None, an empty name or a
negative number; such galaxies are left out, and counted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import astropy.units as u
import numpy as np
from astropy.table import QTable, Table
from astropy.utils.masked import Masked
from numpy.typing import ArrayLike

__all__ = [
    "Agreement",
    "LinearProbe",
    "agreement",
    "class_profiles",
    "cluster_quality",
    "completeness_by_votes",
    "linear_probe",
    "mutual_information",
    "overlap_matrix",
]

#: Galaxies between which the silhouette takes all distances; more would need gigabytes.
_SILHOUETTE_GALAXIES = 5000


@dataclass(kw_only=True, eq=False, repr=False)
class Agreement:
    """How K classes agree with L labels: made by `agreement`.

    Attributes
    ----------
    class_names : tuple of str, shape (K,)
        The classes.
    label_names : tuple of str, shape (L,)
        The labels.
    confusion : array, shape (K, L)
        Number of galaxies of each class and label; expected numbers with probabilities.
    ari : float
        Adjusted Rand index: 1 for the same partition, 0 in the mean for unrelated ones
        (Hubert & Arabie 1985, Journal of Classification 2, 193).
    nmi : float
        Mutual information over the arithmetic mean of the two entropies, 0 to 1.
    ami : float
        The same with chance taken out, 0 in the mean for unrelated partitions (Vinh, Epps &
        Bailey 2010, JMLR 11, 2837).
    n_used, n_left_out : int
        Galaxies with a class and a label, and the others.
    """

    class_names: tuple[str, ...]
    label_names: tuple[str, ...]
    confusion: np.ndarray
    ari: float
    nmi: float
    ami: float
    n_used: int
    n_left_out: int

    def __repr__(self) -> str:
        k, m = self.confusion.shape
        return (
            f"<Agreement: {k} classes, {m} labels, {self.n_used} galaxies "
            f"({self.n_left_out} left out), ARI={self.ari:.3f}, NMI={self.nmi:.3f}>"
        )

    @property
    def majority_label(self) -> np.ndarray:
        """Most common label of each class, shape (K,); empty for a class without galaxies."""
        names = np.array(self.label_names)[self.confusion.argmax(axis=1)]
        return np.where(self.confusion.any(axis=1), names, "")

    @property
    def purity(self) -> np.ndarray:
        """Fraction of each class that has its most common label, shape (K,)."""
        return _ratio(self.confusion.max(axis=1), self.confusion.sum(axis=1))

    @property
    def completeness(self) -> np.ndarray:
        """Of all galaxies with the most common label of a class, the fraction in it, shape (K,)."""
        of_label = self.confusion.sum(axis=0)[self.confusion.argmax(axis=1)]
        return _ratio(self.confusion.max(axis=1), np.where(self.confusion.any(axis=1), of_label, 0))

    @property
    def overall_purity(self) -> float:
        """Fraction of all galaxies that have the most common label of their class."""
        return float(self.confusion.max(axis=1).sum() / self.confusion.sum())

    @property
    def overall_completeness(self) -> float:
        """Fraction of all galaxies that are in the most common class of their label."""
        return float(self.confusion.max(axis=0).sum() / self.confusion.sum())

    def to_table(self) -> QTable:
        """The classes, one a row.

        Returns
        -------
        `~astropy.table.QTable`
            ``class``, ``n`` (galaxies), ``majority_label``, ``purity``, ``completeness`` and, for
            each label, ``n_<label>``.  What is true of all classes together is in ``meta``.
        """
        table = QTable()
        table["class"] = self.class_names
        table["n"] = self.confusion.sum(axis=1)
        table["majority_label"] = self.majority_label
        table["purity"] = self.purity
        table["completeness"] = self.completeness
        table["purity"].info.description = "fraction of the class that has its majority label"
        table["completeness"].info.description = "fraction of the majority label in the class"
        for name, numbers in zip(self.label_names, self.confusion.T, strict=True):
            table[f"n_{name}"] = numbers
        table.meta.update(
            purity=self.overall_purity,
            completeness=self.overall_completeness,
            ari=self.ari,
            nmi=self.nmi,
            ami=self.ami,
            n_used=self.n_used,
            n_left_out=self.n_left_out,
        )
        return table


def agreement(
    classes: ArrayLike,
    labels: ArrayLike,
    *,
    proba: ArrayLike | None = None,
    class_names: Sequence[str] | None = None,
    label_names: Sequence[str] | None = None,
) -> Agreement:
    """Compare classes with labels.

    Parameters
    ----------
    classes : array of int or str, shape (N,)
        Class of each galaxy.
    labels : array of int, bool or str, shape (N,)
        What the galaxies are known to be.  Negative numbers are *unknown*: bin and name
        Hubble types T before.
    proba : array of float, shape (N, K), optional
        Probabilities of classes 0 … K - 1: the confusion matrix, and with it purity and
        completeness, are then expected ones.  The indices (ARI, NMI, AMI) are of ``classes``
        all the same.
    class_names, label_names : sequence of str, optional
        Names of classes (labels) 0, 1, …; of those that are names already, their order.
        By default those that occur, sorted.

    Returns
    -------
    Agreement

    Raises
    ------
    ValueError
        If the lengths differ, numbers are not whole, a class or label is not among the
        names, or no galaxy has both.

    Examples
    --------
    >>> from galmorph.agreement import agreement
    >>> found = agreement([0, 0, 1, 1, 1, 0], ["E", "E", "S", "S", "E", None])
    >>> found.n_left_out, round(found.overall_purity, 2), round(found.ari, 2)
    (1, 0.8, 0.17)
    >>> found.to_table()["class", "majority_label", "purity", "n_E", "n_S"].pprint()
    class majority_label       purity       n_E n_S
    ----- -------------- ------------------ --- ---
        0              E                1.0   2   0
        1              S 0.6666666666666666   1   2
    """
    from sklearn import metrics

    if proba is not None:
        proba = _probabilities(proba)
        class_names = class_names or [str(k) for k in range(proba.shape[1])]
        if len(class_names) != proba.shape[1]:
            raise ValueError(f"{len(class_names)} class_names for {proba.shape[1]} probabilities")
    classes, class_names = _codes("classes", classes, class_names)
    labels, label_names = _codes("labels", labels, label_names)
    _check_lengths(classes=classes, labels=labels, proba=proba)
    used = (classes >= 0) & (labels >= 0)
    if proba is not None:
        used &= np.isfinite(proba).all(axis=1)
    if not used.any():
        raise ValueError("no galaxy has both a class and a label")
    ours, theirs = classes[used], labels[used]
    if proba is None:
        confusion = np.zeros((len(class_names), len(label_names)), dtype=int)
        np.add.at(confusion, (ours, theirs), 1)
    else:
        confusion = np.zeros((len(label_names), len(class_names)))
        np.add.at(confusion, theirs, proba[used])
        confusion = confusion.T
    return Agreement(
        class_names=class_names,
        label_names=label_names,
        confusion=confusion,
        ari=float(metrics.adjusted_rand_score(theirs, ours)),
        nmi=float(metrics.normalized_mutual_info_score(theirs, ours)),
        ami=float(metrics.adjusted_mutual_info_score(theirs, ours)),
        n_used=int(used.sum()),
        n_left_out=int((~used).sum()),
    )


def cluster_quality(
    latents: ArrayLike, classes: ArrayLike, *, rng: np.random.Generator | int | None = 0
) -> QTable:
    """How well classes part the latents, beside k-means and a plain Gaussian mixture.

    Parameters
    ----------
    latents : array of float, shape (N, d)
        Galaxies with numbers that are not finite are left out.
    classes : array of int or str, shape (N,)
        Class of each galaxy.
    rng : `numpy.random.Generator` or int, optional
        For the starts of k-means and the mixture, and the choice of galaxies.

    Returns
    -------
    `~astropy.table.QTable`
        Three rows, ``classes``, ``k-means`` and ``mixture`` (full covariances), all with as
        many classes: ``method``, ``n_classes``, ``silhouette`` and ``calinski_harabasz``.
        ``meta`` counts the galaxies used and left out.

    Raises
    ------
    ValueError
        If the lengths differ, or there are fewer than two classes or three galaxies more
        than classes.

    Notes
    -----
    The silhouette (Rousseeuw 1987, J. Comput. Appl. Math. 20, 53; -1 to 1) compares the
    distance to the own class with that to the next one, and the index of Caliński & Harabasz
    (1974, Communications in Statistics 3, 1) the scatter between classes with that
    inside; higher is better.  Both favour round classes of equal size, as k-means makes them.
    Distances are Euclidean in the latents as given.  Of more than 5,000 galaxies the
    silhouette takes 5,000, the same for all rows.

    Examples
    --------
    >>> import numpy as np
    >>> from galmorph.agreement import cluster_quality
    >>> rng = np.random.default_rng(1)
    >>> classes = rng.integers(0, 2, 300)
    >>> latents = rng.normal(0, 1, (300, 3)) + 4 * classes[:, None]
    >>> table = cluster_quality(latents, classes)
    >>> print(table["method"])
     method
    -------
    classes
    k-means
    mixture
    >>> bool(table["silhouette"].min() > 0.5)
    True
    """
    from sklearn import metrics
    from sklearn.cluster import KMeans
    from sklearn.mixture import GaussianMixture

    latents = _matrix("latents", latents)
    codes, _ = _codes("classes", classes, None)
    _check_lengths(latents=latents, classes=codes)
    used = np.isfinite(latents).all(axis=1) & (codes >= 0)
    latents, codes = latents[used], codes[used]
    k = len(np.unique(codes))
    if k < 2 or len(codes) < k + 3:
        raise ValueError(f"{k} classes of {len(codes)} galaxies have no silhouette")
    rng = np.random.default_rng(rng)
    seed = int(rng.integers(2**31))
    partitions = {
        "classes": codes,
        "k-means": KMeans(k, n_init=10, random_state=seed).fit_predict(latents),
        "mixture": GaussianMixture(k, n_init=3, random_state=seed).fit_predict(latents),
    }
    chosen = np.arange(len(codes))
    if len(codes) > _SILHOUETTE_GALAXIES:
        chosen = rng.choice(len(codes), _SILHOUETTE_GALAXIES, replace=False)
    table = QTable()
    table["method"] = list(partitions)
    table["n_classes"] = [len(np.unique(c)) for c in partitions.values()]
    for name, score, rows in (
        ("silhouette", metrics.silhouette_score, chosen),
        ("calinski_harabasz", metrics.calinski_harabasz_score, slice(None)),
    ):
        table[name] = [
            float(score(latents[rows], c[rows])) if len(np.unique(c[rows])) > 1 else np.nan
            for c in partitions.values()
        ]
    table.meta.update(
        n_used=int(used.sum()), n_left_out=int((~used).sum()), n_silhouette=len(chosen)
    )
    return table


def overlap_matrix(
    weights: ArrayLike,
    means: ArrayLike,
    covariances: ArrayLike,
    *,
    draws: int = 20_000,
    rng: np.random.Generator | int | None = 0,
) -> np.ndarray:
    """Probability that a galaxy of one class of a Gaussian mixture is assigned to another.

    Parameters
    ----------
    weights : array of float, shape (K,)
        Of the classes; normalised here.
    means : array of float, shape (K, d)
        Of the classes.
    covariances : array of float, shape (K, d, d)
        Of the classes.
    draws : int, optional
        Galaxies that are drawn from each class (Monte Carlo): the standard error of an
        element p is sqrt(p (1 - p) / draws), 0.0035 or less by default.
    rng : `numpy.random.Generator` or int, optional
        For the draws.

    Returns
    -------
    array of float, shape (K, K)
        Element (i, j): of the galaxies of class i, the fraction for which class j is the most
        probable one.  Rows have the sum 1.

    Raises
    ------
    ValueError
        If shapes do not fit together, weights are negative, a covariance is not positive
        definite, or there are no draws.

    Examples
    --------
    Two classes 2 σ apart are taken for each other in 16 % of the cases:

    >>> from galmorph.agreement import overlap_matrix
    >>> overlap_matrix([0.5, 0.5], [[0.0], [2.0]], [[[1.0]], [[1.0]]]).round(2)
    array([[0.84, 0.16],
           [0.16, 0.84]])
    """
    from scipy.linalg import solve_triangular

    means = _matrix("means", means)
    weights, covariances = np.asarray(weights, dtype=float), np.asarray(covariances, dtype=float)
    k, d = means.shape
    if weights.shape != (k,) or covariances.shape != (k, d, d):
        raise ValueError(
            f"weights of shape {weights.shape}, means of {means.shape} and covariances of "
            f"{covariances.shape} do not fit together"
        )
    if not (np.isfinite(weights).all() and np.all(weights >= 0) and weights.sum() > 0):
        raise ValueError("weights must be finite, not negative, and not all zero")
    if draws < 1:
        raise ValueError(f"draws must be at least 1, not {draws}")
    try:
        roots = np.linalg.cholesky(covariances)
    except np.linalg.LinAlgError:
        raise ValueError("the covariances must be positive definite") from None
    with np.errstate(divide="ignore"):
        offsets = np.log(weights) - np.log(np.diagonal(roots, axis1=1, axis2=2)).sum(axis=1)
    rng = np.random.default_rng(rng)
    matrix = np.empty((k, k))
    for i in range(k):
        galaxies = means[i] + rng.standard_normal((draws, d)) @ roots[i].T
        log_p = np.empty((k, draws))
        for j in range(k):
            scaled = solve_triangular(roots[j], (galaxies - means[j]).T, lower=True)
            log_p[j] = offsets[j] - 0.5 * np.sum(scaled**2, axis=0)
        matrix[i] = np.bincount(log_p.argmax(axis=0), minlength=k) / draws
    return matrix


def class_profiles(
    proba: ArrayLike,
    columns: Table | Mapping[str, ArrayLike],
    *,
    class_names: Sequence[str] | None = None,
) -> QTable:
    """What the galaxies of each class are like: medians and scatter of any quantities.

    Every galaxy counts in each class by its probability.

    Parameters
    ----------
    proba : array of float, shape (N, K)
        Probabilities of the classes.  Galaxies whose are not finite are left out.
    columns : `~astropy.table.Table` or mapping of str to array, shape (N,)
        Quantities, such as radius, ellipticity, concentration or Sérsic n, with or without
        units.  Columns that are not one number a galaxy are left out, and so are, of one
        column, values that are masked or not finite.  Angles have no median.
    class_names : sequence of str, optional
        By default 0, 1, ….

    Returns
    -------
    `~astropy.table.QTable`
        One row a class: ``class``, ``fraction`` (mean probability), ``n_effective``
        ((Σ p)² / Σ p², Kish 1965; the number of galaxies where they have one class each)
        and, for each quantity, its weighted median ``<name>`` and percentiles ``<name>_p16`` and
        ``<name>_p84``.  ``meta`` counts the galaxies used and left out.

    Raises
    ------
    ValueError
        If lengths differ, probabilities are negative, or no column has numbers.

    Examples
    --------
    >>> from galmorph.agreement import class_profiles
    >>> proba = [[1, 0], [1, 0], [1, 0], [0, 1], [0, 1]]
    >>> table = class_profiles(proba, {"n": [3.5, 4, 4.2, 1, 1.4]}, class_names=["E", "S"])
    >>> table["class", "fraction", "n_effective", "n"].pprint()
    class fraction n_effective  n
    ----- -------- ----------- ---
        E      0.6         3.0 4.0
        S      0.4         2.0 1.2
    """
    proba = _probabilities(proba)
    names = _class_names(class_names, proba.shape[1])
    used = np.isfinite(proba).all(axis=1)
    if not used.any():
        raise ValueError("no galaxy has class probabilities")
    weights = proba[used]
    table = QTable()
    table["class"] = names
    table["fraction"] = weights.mean(axis=0)
    table["n_effective"] = _ratio(weights.sum(axis=0) ** 2, (weights**2).sum(axis=0))
    table["fraction"].info.description = "mean probability of the class"
    table["n_effective"].info.description = "effective number of galaxies"
    keys = columns.colnames if isinstance(columns, Table) else list(columns)
    for key in keys:
        numbers = _numbers(columns[key])
        if numbers is None:
            continue
        values, unit = numbers
        _check_lengths(**{"proba": proba, key: values})
        found = [_weighted_quantiles(values[used], w, (0.5, 0.16, 0.84)) for w in weights.T]
        for suffix, row in zip(("", "_p16", "_p84"), np.transpose(found), strict=True):
            table[key + suffix] = row if unit is None else u.Quantity(row, unit, subok=True)
    if len(table.colnames) == 3:
        raise ValueError(f"none of the columns {keys} holds one number a galaxy")
    table.meta.update(n_used=int(used.sum()), n_left_out=int((~used).sum()))
    return table


def completeness_by_votes(
    proba: ArrayLike,
    votes: ArrayLike,
    bins: int | Sequence[float] = 10,
    *,
    threshold: float = 0.5,
) -> QTable:
    """Which fraction of the galaxies that people voted for is given to a class.

    Parameters
    ----------
    proba : array of float or bool, shape (N,)
        Probability of the class, or of several: ``proba[:, spirals].sum(axis=1)``.
    votes : array of float, shape (N,)
        Fraction of the votes, 0 to 1.  Galaxies with either not finite are left out.
    bins : int or sequence of float, optional
        Number of bins of equal width from 0 to 1, or their edges.
    threshold : float, optional
        A galaxy is given to the class if its probability is larger.

    Returns
    -------
    `~astropy.table.QTable`
        One row a bin: ``votes_low`` and ``votes_high`` (edges), ``n`` (galaxies), ``fraction``
        (given to the class), ``fraction_low`` and ``fraction_high`` (ends of the 68 % binomial
        interval of Wilson 1927) and ``mean_proba``.  Fractions of empty bins are NaN.  ``meta``
        counts the galaxies used and left out.

    Raises
    ------
    ValueError
        If the lengths differ, the bins do not increase, or votes are outside of [0, 1].

    Examples
    --------
    >>> from galmorph.agreement import completeness_by_votes
    >>> table = completeness_by_votes([0.1, 0.2, 0.9, 0.4, 0.8], [0, 0.3, 0.7, 0.8, 1], bins=2)
    >>> table["votes_low", "votes_high", "n", "fraction"].pprint()
    votes_low votes_high  n       fraction
    --------- ---------- --- ------------------
          0.0        0.5   2                0.0
          0.5        1.0   3 0.6666666666666666
    """
    from astropy.stats import binom_conf_interval

    proba, votes = _vector("proba", proba), _vector("votes", votes)
    _check_lengths(proba=proba, votes=votes)
    used = np.isfinite(proba) & np.isfinite(votes)
    if np.any((votes[used] < 0) | (votes[used] > 1)):
        raise ValueError("votes must be fractions from 0 to 1")
    edges = np.asarray(bins, dtype=float)
    if edges.ndim == 0:
        edges = np.linspace(0, 1, max(int(bins), 0) + 1)
    if edges.ndim != 1 or len(edges) < 2 or not np.all(np.diff(edges) > 0):
        raise ValueError(f"bins must be a positive number or increasing edges, not {bins!r}")
    # the last bin holds its upper edge, as numpy's histograms do
    place = np.where(votes == edges[-1], len(edges) - 1, np.searchsorted(edges, votes, "right")) - 1
    used &= (place >= 0) & (place < len(edges) - 1)
    number, given, total = (
        np.bincount(place[used], weights, len(edges) - 1)
        for weights in (None, proba[used] > threshold, proba[used])
    )
    filled = number > 0
    interval = np.full((2, len(number)), np.nan)
    interval[:, filled] = binom_conf_interval(given[filled], number[filled], interval="wilson")
    table = QTable()
    table["votes_low"], table["votes_high"] = edges[:-1], edges[1:]
    table["n"] = number
    table["fraction"] = _ratio(given, number)
    table["fraction_low"], table["fraction_high"] = interval
    table["mean_proba"] = _ratio(total, number)
    table.meta.update(
        threshold=float(threshold), n_used=int(used.sum()), n_left_out=int((~used).sum())
    )
    return table


@dataclass(kw_only=True, eq=False, repr=False)
class LinearProbe:
    """What a linear map of latents knows of labels that it has not seen: made by `linear_probe`.

    Attributes
    ----------
    measure : {"auc", "accuracy", "within"}
        What ``score`` is: the area under the ROC curve (two labels), the fraction of right
        labels (several), or the fraction of numbers within the tolerance.
    score : float
        Mean over the folds.
    score_err : float
        Standard error of that, from the scatter of the folds.
    rms : float
        Root mean square of the errors of numbers; NaN for labels.
    predictions : array of float, shape (N,)
        Of each galaxy when it was left out: the probability of the second label, the
        index of the label, or the number.  NaN for galaxies that were not used.
    label_names : tuple of str
        The labels in the order of the indices; empty for numbers.
    n_used, n_left_out : int
        Galaxies with latents and a label, and the others.
    """

    measure: str
    score: float
    score_err: float
    rms: float
    predictions: np.ndarray
    label_names: tuple[str, ...]
    n_used: int
    n_left_out: int

    def __repr__(self) -> str:
        rms = f", rms={self.rms:.3g}" if np.isfinite(self.rms) else ""
        return (
            f"<LinearProbe: {self.measure}={self.score:.3f} ± {self.score_err:.3f}{rms}, "
            f"{self.n_used} galaxies ({self.n_left_out} left out)>"
        )


def linear_probe(
    latents: ArrayLike,
    labels: ArrayLike,
    *,
    tolerance: float | None = None,
    folds: int = 5,
    rng: np.random.Generator | int | None = 0,
) -> LinearProbe:
    """How much latents know of labels, by a linear map and cross-validation.

    Parameters
    ----------
    latents : array of float, shape (N, d)
        Standardised here.  Galaxies with numbers that are not finite are left out.
    labels : array, shape (N,)
        Names or whole numbers; with ``tolerance``, any numbers, negative ones too, such as the
        Hubble type T.
    tolerance : float, optional
        Labels are numbers, and right when they are off by no more than this.
    folds : int, optional
        Parts of the galaxies, each of which is left out once.
    rng : `numpy.random.Generator` or int, optional
        For the parts.

    Returns
    -------
    LinearProbe

    Raises
    ------
    ValueError
        If the lengths differ, there are fewer than two labels, a label has fewer galaxies
        than there are folds, the tolerance is not positive, or labels are not whole numbers
        and there is no tolerance.

    Notes
    -----
    Labels: logistic regression with a unit normal prior on the coefficients (scikit-learn's
    C = 1), folds with equal shares of each label.  Numbers: ridge regression, whose penalty is
    chosen by leaving out one galaxy after the other of those that are fitted.

    Examples
    --------
    >>> import numpy as np
    >>> from galmorph.agreement import linear_probe
    >>> rng = np.random.default_rng(1)
    >>> latents = rng.normal(0, 1, (400, 4))
    >>> spiral = latents[:, 0] + 0.3 * rng.normal(0, 1, 400) > 0
    >>> probe = linear_probe(latents, spiral)
    >>> probe.measure, bool(probe.score > 0.95)
    ('auc', True)
    >>> hubble_type = 2 + 3 * latents[:, 1] + rng.normal(0, 1, 400)
    >>> probe = linear_probe(latents, hubble_type, tolerance=1.5)
    >>> bool(abs(probe.score - 0.866) < 0.06 and abs(probe.rms - 1) < 0.1)
    True
    """
    latents = _matrix("latents", latents)
    if tolerance is None:
        codes, names = _codes("labels", labels, None)
        known = codes >= 0
    else:
        if not (np.isfinite(tolerance) and tolerance > 0):
            raise ValueError(f"tolerance must be positive, not {tolerance}")
        codes, names = _vector("labels", labels), ()
        known = np.isfinite(codes)
    _check_lengths(latents=latents, labels=codes)
    used = known & np.isfinite(latents).all(axis=1)
    if isinstance(folds, bool) or int(folds) != folds or folds < 2:
        raise ValueError(f"folds must be a whole number of 2 or more, not {folds!r}")
    seed = int(np.random.default_rng(rng).integers(2**31))
    x, y = latents[used], codes[used]
    if tolerance is None:
        present, y = np.unique(y, return_inverse=True)
        names = tuple(names[k] for k in present)
        measure = "auc" if len(names) == 2 else "accuracy"
        found, scores = _probe_labels(x, y, measure, folds, seed)
        rms = np.nan
    else:
        measure = "within"
        found, scores = _probe_numbers(x, y, tolerance, folds, seed)
        rms = float(np.sqrt(np.mean((found - y) ** 2)))
    predictions = np.full(len(used), np.nan)
    predictions[used] = found
    return LinearProbe(
        measure=measure,
        score=float(np.mean(scores)),
        score_err=float(np.std(scores, ddof=1) / np.sqrt(folds)),
        rms=rms,
        predictions=predictions,
        label_names=names,
        n_used=int(used.sum()),
        n_left_out=int((~used).sum()),
    )


def mutual_information(
    classes: ArrayLike,
    angle: ArrayLike | u.Quantity,
    *,
    period: float | u.Quantity = np.pi,
    bins: int = 12,
    shuffles: int = 200,
    rng: np.random.Generator | int | None = 0,
) -> tuple[float, float]:
    """Mutual information of class and an angle, without the bias of few galaxies.

    Classes that do not care for the orientation of galaxies have none.

    Parameters
    ----------
    classes : array of int or str, shape (N,)
        Class of each galaxy.
    angle : array of float or `~astropy.units.Quantity`, shape (N,)
        Position angle, in radians if without a unit.  Galaxies where it is not finite are left
        out; round ones have none, and should be.
    period : float or `~astropy.units.Quantity`, optional
        After which the angle repeats: π for the axis of a galaxy, 2 π for a direction.
    bins : int, optional
        Of the angle, over one period.  What is finer than these is not seen.
    shuffles : int, optional
        Random permutations of the angles, of which the mutual information, zero but for
        chance, is found as well.
    rng : `numpy.random.Generator` or int, optional
        For the permutations.

    Returns
    -------
    value : float
        In nats: the plug-in estimate less the mean of the shuffled ones, so that it is
        negative as often as not where there is none.
    err : float
        Standard deviation of the shuffled ones.

    Raises
    ------
    ValueError
        If the lengths differ, no galaxy has both, or a number is too small.

    Notes
    -----
    The bias of the plug-in estimate of unrelated quantities is about (K - 1) (bins - 1) / 2 N
    (Miller 1955); shuffles find it for bins with few galaxies too.

    Examples
    --------
    >>> import numpy as np
    >>> from galmorph.agreement import mutual_information
    >>> rng = np.random.default_rng(1)
    >>> angle = rng.uniform(0, np.pi, 2000)
    >>> value, err = mutual_information(rng.integers(0, 5, 2000), angle)
    >>> bool(abs(value) < 4 * err and err < 0.004)
    True
    >>> value, err = mutual_information(angle > np.pi / 2, angle)
    >>> bool(abs(value / np.log(2) - 1) < 0.02)
    True
    """
    codes, _ = _codes("classes", classes, None)
    angle = _vector("angle", _radians(angle))
    _check_lengths(classes=codes, angle=angle)
    period = float(_radians(period))
    if not (np.isfinite(period) and period > 0):
        raise ValueError(f"period must be positive, not {period}")
    if bins < 2 or shuffles < 2:
        raise ValueError(f"bins and shuffles must be at least 2, not {bins} and {shuffles}")
    used = (codes >= 0) & np.isfinite(angle)
    if not used.any():
        raise ValueError("no galaxy has both a class and an angle")
    codes, phase = codes[used], np.mod(angle[used] / period, 1.0)
    # rounding can lift the remainder of a tiny negative number to 1
    place = np.minimum((phase * bins).astype(int), bins - 1)
    shape = (int(codes.max()) + 1, int(bins))
    rng = np.random.default_rng(rng)
    chance = [_plug_in_information(codes, rng.permutation(place), shape) for _ in range(shuffles)]
    value = _plug_in_information(codes, place, shape) - np.mean(chance)
    return float(value), float(np.std(chance, ddof=1))


# -- parts ---------------------------------------------------------------------------------


def _probe_labels(
    x: np.ndarray, y: np.ndarray, measure: str, folds: int, seed: int
) -> tuple[np.ndarray, list[float]]:
    """What each galaxy is given when it is left out, and the score of each fold."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score
    from sklearn.model_selection import StratifiedKFold
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    numbers = np.bincount(y) if len(y) else np.zeros(0, dtype=int)
    if len(numbers) < 2:
        raise ValueError("labels must be of two kinds or more")
    if numbers.min() < folds:
        raise ValueError(f"a label has {numbers.min()} galaxies only, fewer than {folds} folds")
    found, scores = np.empty(len(y)), []
    for fit, left_out in StratifiedKFold(folds, shuffle=True, random_state=seed).split(x, y):
        model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
        model.fit(x[fit], y[fit])
        if measure == "auc":
            found[left_out] = model.predict_proba(x[left_out])[:, 1]
            scores.append(roc_auc_score(y[left_out], found[left_out]))
        else:
            found[left_out] = model.predict(x[left_out])
            scores.append(np.mean(found[left_out] == y[left_out]))
    return found, scores


def _probe_numbers(
    x: np.ndarray, y: np.ndarray, tolerance: float, folds: int, seed: int
) -> tuple[np.ndarray, list[float]]:
    """What each galaxy is given when it is left out, and the score of each fold."""
    from sklearn.linear_model import RidgeCV
    from sklearn.model_selection import KFold
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    if len(y) < 2 * folds:
        raise ValueError(f"{len(y)} galaxies are too few for {folds} folds")
    found, scores = np.empty(len(y)), []
    for fit, left_out in KFold(folds, shuffle=True, random_state=seed).split(x):
        model = make_pipeline(StandardScaler(), RidgeCV(np.logspace(-3, 4, 15)))
        found[left_out] = model.fit(x[fit], y[fit]).predict(x[left_out])
        scores.append(np.mean(np.abs(found[left_out] - y[left_out]) <= tolerance))
    return found, scores


def _plug_in_information(a: np.ndarray, b: np.ndarray, shape: tuple[int, int]) -> float:
    """Mutual information, in nats, of the frequencies of two codes."""
    joint = np.bincount(a * shape[1] + b, minlength=shape[0] * shape[1]).reshape(shape) / len(a)
    alone = joint.sum(axis=1, keepdims=True) * joint.sum(axis=0)
    filled = joint > 0
    return float(np.sum(joint[filled] * np.log(joint[filled] / alone[filled])))


def _weighted_quantiles(
    values: np.ndarray, weights: np.ndarray, levels: Sequence[float]
) -> np.ndarray:
    """Quantiles by linear interpolation between the middles of the weights; NaN of nothing.

    For equal weights the definition of Hazen (1914): the median is the usual one.
    """
    counted = np.isfinite(values) & (weights > 0)
    if not counted.any():
        return np.full(len(levels), np.nan)
    order = np.argsort(values[counted])
    values, weights = values[counted][order], weights[counted][order]
    middle = (np.cumsum(weights) - 0.5 * weights) / weights.sum()
    return np.interp(levels, middle, values)


def _ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """Quotient, NaN where the divisor is zero."""
    nothing = np.full(np.shape(below), np.nan)
    return np.divide(above, below, out=nothing, where=np.asarray(below) > 0)


# -- what is given -------------------------------------------------------------------------


def _split_mask(values: Any) -> tuple[np.ndarray, np.ndarray]:
    """Plain array, and where it is masked."""
    if isinstance(values, Masked):
        return np.asarray(values.unmasked), np.asarray(values.mask)
    array = np.ma.asarray(values)
    return np.asarray(array.data), np.ma.getmaskarray(array)


def _codes(what: str, values: Any, names: Sequence[str] | None) -> tuple[np.ndarray, tuple]:
    """Classes or labels as numbers 0, 1, …, -1 where unknown, and their names."""
    values, unknown = _split_mask(values)
    if values.ndim != 1:
        raise ValueError(f"{what} must have shape (N,), not {values.shape}")
    if values.dtype.kind == "O":
        unknown |= np.array([v is None or v != v for v in values], dtype=bool)
        values = _filled(what, values, unknown)
    if values.dtype.kind == "S":  # as FITS tables have them
        values = np.char.decode(values, "utf-8")
    if values.dtype.kind == "U":
        return _codes_of_names(what, values, unknown | (np.char.strip(values) == ""), names)
    if values.dtype.kind not in "biuf":
        raise ValueError(f"{what} must be names or whole numbers, not {values.dtype}")
    return _codes_of_numbers(what, values, unknown, names)


def _filled(what: str, values: np.ndarray, unknown: np.ndarray) -> np.ndarray:
    """Objects as names or numbers, with anything where they are unknown."""
    known = values[~unknown]
    kinds = {isinstance(v, str) for v in known}
    if len(kinds) > 1:
        raise ValueError(f"{what} must be all names or all numbers")
    if kinds == {True}:
        return np.where(unknown, "", values).astype(str)
    filled = np.full(len(values), -1.0)
    try:
        filled[~unknown] = known.astype(float)
    except (TypeError, ValueError):
        raise ValueError(f"{what} must be names or whole numbers") from None
    return filled


def _codes_of_names(
    what: str, values: np.ndarray, unknown: np.ndarray, names: Sequence[str] | None
) -> tuple[np.ndarray, tuple]:
    present = np.unique(values[~unknown])
    names = tuple(str(name) for name in (present if names is None else names))
    others = sorted(set(present.tolist()) - set(names))
    if others:
        raise ValueError(f"{what} {others} are not among the names {list(names)}")
    index = {name: k for k, name in enumerate(names)}
    codes = [-1 if no else index[str(v)] for v, no in zip(values, unknown, strict=True)]
    return np.array(codes, dtype=int), names


def _codes_of_numbers(
    what: str, values: np.ndarray, unknown: np.ndarray, names: Sequence[str] | None
) -> tuple[np.ndarray, tuple]:
    logical = values.dtype.kind == "b"
    numbers = np.where(unknown, -1.0, values)
    numbers = np.where(np.isfinite(numbers), numbers, -1.0)
    codes = numbers.astype(int)
    if np.any((codes != numbers) & (numbers >= 0)):
        raise ValueError(f"{what} must be names or whole numbers, not {values.dtype}")
    codes = np.where(numbers < 0, -1, codes)
    if names is not None:
        if codes.max(initial=-1) >= len(names):
            raise ValueError(f"{what} go up to {codes.max()}, but there are {len(names)} names")
        return codes, tuple(str(name) for name in names)
    present, inverse = np.unique(codes[codes >= 0], return_inverse=True)
    codes[codes >= 0] = inverse
    return codes, tuple(str(bool(v)) if logical else str(v) for v in present)


def _class_names(names: Sequence[str] | None, k: int) -> tuple[str, ...]:
    names = tuple(str(name) for name in (range(k) if names is None else names))
    if len(names) != k:
        raise ValueError(f"{len(names)} class_names for {k} classes")
    return names


def _numbers(column: Any) -> tuple[np.ndarray, u.UnitBase | None] | None:
    """One number a galaxy, NaN where masked, with the unit; None for other columns."""
    unit = getattr(column, "unit", None)
    try:
        values, masked = _split_mask(column)
    except (TypeError, ValueError):  # a mixin column, as of sky coordinates
        return None
    if values.dtype.kind not in "biuf" or values.ndim != 1:
        return None
    return np.where(masked, np.nan, values), unit


def _matrix(name: str, values: ArrayLike) -> np.ndarray:
    values = np.asarray(values, dtype=float)
    if values.ndim != 2 or not values.shape[1]:
        raise ValueError(f"{name} must have shape (rows, columns), not {values.shape}")
    return values


def _vector(name: str, values: ArrayLike) -> np.ndarray:
    values, masked = _split_mask(values)
    if values.ndim != 1:
        raise ValueError(f"{name} must have shape (N,), not {values.shape}")
    if values.dtype.kind == "O":
        values = np.array([np.nan if v is None else v for v in values])
    if values.dtype.kind not in "biuf":
        raise ValueError(f"{name} must be numbers, not {values.dtype}")
    return np.where(masked, np.nan, values.astype(float))


def _probabilities(proba: ArrayLike) -> np.ndarray:
    proba = _matrix("proba", proba)
    if np.any(proba < 0):
        raise ValueError("proba must not be negative")
    return proba


def _radians(angle: Any) -> Any:
    """Plain numbers; those of table columns have a unit without being a Quantity."""
    unit = getattr(angle, "unit", None)
    if unit is None:
        return angle
    return (angle.value if isinstance(angle, u.Quantity) else angle) * unit.to(u.rad)


def _check_lengths(**arrays: np.ndarray | None) -> None:
    lengths = {name: len(values) for name, values in arrays.items() if values is not None}
    if len(set(lengths.values())) > 1:
        text = ", ".join(f"{name} of {n}" for name, n in lengths.items())
        raise ValueError(f"lengths differ: {text}")
