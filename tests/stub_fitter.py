"""A fitter of a few lines, so that tests of input and output are quick and exact."""

from types import SimpleNamespace

import numpy as np

from galmorph.results import BACKGROUND_TERMS


class StubFitter:
    """Flux: sum of the usable pixels; position: the first guess, or the centre of the stamp.

    Parameters
    ----------
    fail : callable, optional
        Given a batch; may raise what a fitter might raise.
    """

    def __init__(self, fail=None):
        self._fail = fail
        self._seen = []

    @property
    def batches(self):
        """Batches that were fitted."""
        return self._seen

    @property
    def indices(self):
        """Galaxies that were fitted, in order."""
        return [int(i) for batch in self._seen for i in batch.index]

    def fit_stamps(self, batch, model, *, background="constant"):
        if self._fail is not None:
            self._fail(batch)
        self._seen.append(batch)
        n, ny, nx = batch.data.shape
        names = model.param_names
        params = np.tile(model.parameters, (n, 1))
        params[:, names.index("flux")] = batch.data.sum(axis=(1, 2))
        centre = np.array([(nx - 1) / 2, (ny - 1) / 2])
        position = np.where(np.isfinite(batch.position), batch.position, centre)
        params[:, [names.index("x_0"), names.index("y_0")]] = position
        nb = BACKGROUND_TERMS[background]
        spread = np.linspace(0.1, 0.2, len(names))
        return SimpleNamespace(
            params=params,
            cov=np.tile(np.diag(spread**2), (n, 1, 1)),
            background=np.tile([0.25, 0.01, -0.02][:nb], (n, 1)),
            background_cov=np.tile(np.eye(nb) * 1e-4, (n, 1, 1)),
            chi2=(batch.data * batch.inv_sigma).sum(axis=(1, 2)) ** 2,
            dof=(batch.inv_sigma > 0).sum(axis=(1, 2)) - len(names) - nb,
            n_iter=np.full(n, 3),
            flags=batch.flags.copy(),
        )
