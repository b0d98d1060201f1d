"""Nested sampling by dynesty, with the likelihood evaluated for many points at a time.

Nothing here knows of galaxies.  dynesty asks for one value at a time, which for a likelihood on
tensors is nearly all overhead.  But it can propose several new points independently of each
other, and what their threads ask for is collected and evaluated at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

import numpy as np

__all__ = ["Lockstep", "NestedRun", "nested_sampling"]

# new points that are proposed at once; each batch of them has the threshold at its beginning
_AT_ONCE = 64
# up to so many coordinates new points are found by random walks, of which all are equally long
_WALKED = 20


class Lockstep:
    """A pool of threads whose calls of a function are evaluated together.

    One thread runs at a time, and in the order of the arguments, so that what is evaluated
    together is always the same.

    Parameters
    ----------
    evaluate : callable
        From points (M, D) to values (M,); called from the thread that calls `map`.
    size : int
        Threads.

    Examples
    --------
    >>> import numpy as np
    >>> from galmorph.inference.nested import Lockstep
    >>> with Lockstep(lambda x: np.sum(x, axis=1), 3) as pool:
    ...     pool.map(lambda i: int(10 * pool(np.full(2, i))), [1, 2, 3, 4])
    [20, 40, 60, 80]
    """

    def __init__(self, evaluate: Callable[[np.ndarray], np.ndarray], size: int) -> None:
        self.size, self._evaluate = size, evaluate
        self._threads = ThreadPoolExecutor(size)
        self._asked: SimpleQueue[Any] = SimpleQueue()
        self._answers = [SimpleQueue() for _ in range(size)]
        self._running: int | None = None

    def __enter__(self) -> Lockstep:
        return self

    def __exit__(self, *error: object) -> None:
        self._threads.shutdown()

    def __call__(self, point: np.ndarray) -> Any:
        """The value at a point (D,)."""
        own = self._running
        if own is None:
            return self._evaluate(np.asarray(point)[None])[0]
        self._asked.put(np.asarray(point))
        return self._answers[own].get()

    def map(self, function: Callable[[Any], Any], arguments: Iterable[Any]) -> list[Any]:
        """Values of a function that may call this object, of all arguments."""
        arguments = list(arguments)
        found: list[Any] = []
        for first in range(0, len(arguments), self.size):
            found += self._together(function, arguments[first : first + self.size])
        return found

    def _together(self, function: Callable[[Any], Any], arguments: list[Any]) -> list[Any]:
        futures = []

        def run(argument: Any) -> Any:
            try:
                return function(argument)
            finally:
                self._asked.put(None)

        points: dict[int, np.ndarray] = {}
        for self._running, argument in enumerate(arguments):
            futures.append(self._threads.submit(run, argument))
            self._wait(points)
        while points:
            values = self._evaluate(np.array(list(points.values())))
            answers, points = dict(zip(points, values, strict=True)), {}
            for self._running, value in answers.items():
                self._answers[self._running].put(value)
                self._wait(points)
        self._running = None
        return [future.result() for future in futures]

    def _wait(self, points: dict[int, np.ndarray]) -> None:
        """Let the running thread go on until it asks or ends."""
        point = self._asked.get()
        if point is not None:
            points[self._running] = point


@dataclass
class NestedRun:
    """What nested sampling has found.

    Attributes
    ----------
    u : array, shape (S, D)
        Points of the unit cube.
    log_weight : array, shape (S,)
        Of the points, as draws of the posterior; of sum 1.
    log_evidence, log_evidence_err : float
    calls : int
        Evaluated likelihoods.
    """

    u: np.ndarray
    log_weight: np.ndarray
    log_evidence: float
    log_evidence_err: float
    calls: int

    @property
    def ess(self) -> float:
        """Effective number of draws (Kish 1965)."""
        return float(1.0 / np.exp(2 * self.log_weight).sum())


def nested_sampling(
    log_likelihood: Callable[[np.ndarray], np.ndarray],
    size: int,
    *,
    rng: np.random.Generator,
    live: int = 400,
    dlogz: float = 0.05,
) -> NestedRun:
    """Integrate a likelihood over the unit cube.

    Parameters
    ----------
    log_likelihood : callable
        From points (M, D) of the unit cube to natural logarithms (M,).
    size : int
        D.
    rng : `numpy.random.Generator`
    live : int, optional
        Live points.
    dlogz : float, optional
        Logarithm of the evidence that may be left.

    Returns
    -------
    NestedRun

    Notes
    -----
    Skilling 2006 (Bayesian Anal. 1, 833); Speagle 2020 (MNRAS 493, 3132).  New points are
    found by random walks, above twenty coordinates along slices.

    Examples
    --------
    >>> import numpy as np
    >>> from galmorph.inference.nested import nested_sampling
    >>> def log_likelihood(u):  # a normal distribution of width 0.05, inside the cube
    ...     return -0.5 * np.square((u - 0.5) / 0.05).sum(1) - 2 * np.log(0.05 * np.sqrt(2 * np.pi))
    >>> run = nested_sampling(log_likelihood, 2, rng=np.random.default_rng(1), live=100)
    >>> bool(abs(run.log_evidence) < 4 * run.log_evidence_err)
    True
    """
    import dynesty

    with Lockstep(log_likelihood, min(_AT_ONCE, max(1, live // 4))) as pool:
        sampler = dynesty.NestedSampler(
            pool,
            _as_it_is,
            size,
            nlive=live,
            sample="rwalk" if size <= _WALKED else "rslice",
            rstate=rng,
            pool=pool,
            queue_size=pool.size,
        )
        sampler.run_nested(dlogz=dlogz, print_progress=False)
    found = sampler.results
    return NestedRun(
        u=found.samples_u,
        log_weight=found.logwt - np.logaddexp.reduce(found.logwt),
        log_evidence=float(found.logz[-1]),
        log_evidence_err=float(found.logzerr[-1]),
        calls=int(np.sum(found.ncall)),
    )


def _as_it_is(u: np.ndarray) -> np.ndarray:
    return u
