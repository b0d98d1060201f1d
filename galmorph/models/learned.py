"""A galaxy as a network has learned it."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any

import astropy.units as u
import numpy as np
from astropy.modeling.parameters import Parameter

from galmorph.models.base import GalaxyModel, _check_shape
from galmorph.psf import PSF

if TYPE_CHECKING:
    from galmorph.nets.learned import LearnedShape

__all__ = ["LearnedGalaxy2D"]

_GEOMETRY = ("flux", "x_0", "y_0", "r_50", "theta")


def _geometric_parameters() -> dict[str, Parameter]:
    return {
        "flux": Parameter(default=1.0, description="Total flux"),
        "x_0": Parameter(default=0.0, description="Centre in x, pixels"),
        "y_0": Parameter(default=0.0, description="Centre in y, pixels"),
        "r_50": Parameter(
            default=3.0, bounds=(0.05, None), description="Half-light semi-major axis, pixels"
        ),
        "theta": Parameter(default=0.0, description="Angle of the major axis from +x, radians"),
    }


class LearnedGalaxy2D(GalaxyModel):
    r"""A galaxy drawn by a network, as a detector sees it.

    Parameters
    ----------
    flux : float
        Total flux, integrated to infinity.
    x_0, y_0 : float
        Centre (where the light has its cusp) in pixels; the first pixel is centred on (0, 0).
    r_50 : float
        Semi-major axis, in pixels, of the ellipse that holds half of the light.
    theta : float or `~astropy.units.Quantity`
        Angle of the major axis, counter-clockwise from +x, in radians.
    z0, z1, ... : float
        Latents: the shape.  ``z0`` is the Sérsic index and ``z1`` the axis ratio, each through
        a fixed monotone function; where all others are zero the galaxy is a Sérsic profile.
    shape : LearnedShape
        The network; see `from_pretrained` and `read`.
    psf : PSF, array, or model, optional
        See `galmorph.PSF`.

    Notes
    -----
    The light before the PSF is a Sérsic profile times what it misses,

    .. math:: I(\mathbf{x}) \propto S(u; n(z_0))\, \exp R(\mathbf{p}; z), \qquad u = |\mathbf{p}|,

    where :math:`\mathbf{p}` are coordinates in which the half-light ellipse of the profile is
    the unit circle, and R is a spline that the network draws, zero at the centre and beyond
    six half-light radii.

    Copies share the network; a model is pickled with the name of its weights, or with the
    weights themselves where these were read from a file.

    Examples
    --------
    >>> from galmorph import LearnedGalaxy2D
    >>> galaxy = LearnedGalaxy2D.from_pretrained(flux=100, x_0=31.5, y_0=31.5, r_50=5)
    >>> galaxy.render((64, 64)).shape
    (64, 64)
    """

    _param_names = ()

    def __init__(self, *args: Any, shape: LearnedShape, psf: Any = None, **kwargs: Any) -> None:
        parameters = _geometric_parameters()
        for i in range(shape.latent_dim):
            parameters[f"z{i}"] = Parameter(default=0.0, description=f"Latent {i}")
        for name, parameter in parameters.items():
            parameter._name = name
        # astropy looks names up before it lets anything be set
        self.__dict__.update(parameters, _names=tuple(parameters), _shape=shape)
        count = kwargs.get("n_models") or 1
        if count > 1:  # astropy broadcasts the defaults of class attributes only
            for name in self._names[len(args) :]:
                kwargs.setdefault(name, np.full(count, parameters[name].default))
        super().__init__(*args, psf=psf, **kwargs)

    @property
    def param_names(self) -> tuple[str, ...]:
        """Names of the parameters: geometry, then latents."""
        return self._names

    @property
    def shape(self) -> LearnedShape:
        """The network."""
        return self._shape

    @property
    def latent_names(self) -> tuple[str, ...]:
        """``z0``, ``z1``, ..."""
        return self._names[len(_GEOMETRY) :]

    def default_bounds(self) -> dict[str, tuple[float | None, float | None]]:
        """Bounds of the parameters where the user has set none."""
        bounds = dict.fromkeys(self._names, (None, None))
        return bounds | {"r_50": (0.05, None)}

    # -- where it comes from -----------------------------------------------------------

    @classmethod
    def from_pretrained(cls, name: str = "default", **kwargs: Any) -> LearnedGalaxy2D:
        """The model with weights that are installed.

        Parameters
        ----------
        name : str, optional
            Of the weights; ``galmorph weights`` lists them.
        **kwargs
            Parameters, ``psf`` and all else that the model takes.

        Returns
        -------
        LearnedGalaxy2D
        """
        from galmorph.nets.learned import LearnedShape

        return cls(shape=LearnedShape.from_pretrained(name), **kwargs)

    @classmethod
    def read(cls, path: str | PathLike[str], **kwargs: Any) -> LearnedGalaxy2D:
        """The model with weights from a file (safetensors).

        Parameters
        ----------
        path : path-like
        **kwargs
            As for `from_pretrained`.

        Returns
        -------
        LearnedGalaxy2D
        """
        from galmorph.nets.learned import LearnedShape

        return cls(shape=LearnedShape.read(path), **kwargs)

    def write(self, path: str | PathLike[str]) -> None:
        """Write the weights to a file that `read` takes."""
        self._shape.write(path)

    # -- copies ------------------------------------------------------------------------

    def __deepcopy__(self, memo: dict[int, Any]) -> LearnedGalaxy2D:
        from copy import deepcopy

        memo[id(self._shape)] = self._shape
        new = self.__class__.__new__(self.__class__)
        memo[id(self)] = new
        for key, value in self.__dict__.items():
            new.__dict__[key] = deepcopy(value, memo)
        for name in self._names:
            new.__dict__[name]._model = new
        return new

    # -- the prior ---------------------------------------------------------------------

    @property
    def prior(self) -> Any:
        """Distribution of the latents, with ``log_prob`` and ``sample``, numpy in and out."""
        return self._shape.prior

    def sample(
        self,
        n: int,
        rng: np.random.Generator | int | None = None,
        *,
        population: Any = None,
        classes: Any = None,
        condition: Any = None,
    ) -> np.ndarray:
        """Parameters of galaxies with shapes drawn from a prior or a population.

        Parameters
        ----------
        n : int
        rng : `numpy.random.Generator` or int, optional
        population : str or object, optional
            Shapes of real galaxies in place of the prior of the network: ``"default"`` or another
            name of a `galmorph.nets.flow.Population`, or any object with ``sample(n, rng)`` that
            gives latents (n, d).
        classes : object, optional
            Handed to ``population.sample(n, rng, classes=classes)``.
        condition : object, optional
            Handed to ``population.sample(n, condition, rng)``.

        Returns
        -------
        array, shape (n, P)
            Flux, centre, size and angle are the model's own.  For `render`.

        Raises
        ------
        ValueError
            If classes or a condition are given without a population, or its latents are of
            another number.
        """
        if population is None and (classes is not None or condition is not None):
            raise ValueError("classes and condition need a population")
        if population is None:
            population = self._shape.prior
        elif isinstance(population, str):
            from galmorph.nets.flow import Population

            population = Population.from_pretrained(population)
        chosen = {} if classes is None else {"classes": classes}
        first = (n, rng) if condition is None else (n, condition, rng)
        latents = np.asarray(population.sample(*first, **chosen))
        if latents.shape != (n, self._shape.latent_dim):
            raise ValueError(
                f"the population gives {latents.shape}, not {(n, self._shape.latent_dim)}"
            )
        params = np.empty((n, len(self._names)))
        for i, name in enumerate(_GEOMETRY):
            params[:, i] = np.ravel(getattr(self, name).value)[0]
        params[:, len(_GEOMETRY) :] = latents
        return params

    # -- units -------------------------------------------------------------------------

    def _parameter_units_for_data_units(self, inputs_unit, outputs_unit):
        return {
            "flux": outputs_unit["z"],
            "x_0": inputs_unit["x"],
            "y_0": inputs_unit["y"],
            "r_50": inputs_unit["x"],
            "theta": u.rad,
        }

    def _lengths(self) -> set[str]:
        return {"x_0", "y_0", "r_50"}

    # -- drawing -----------------------------------------------------------------------

    def _at_points(
        self, params: np.ndarray, x: np.ndarray, y: np.ndarray, *, derivatives: bool = False
    ) -> Any:
        from galmorph.rendering.learned_model import learned_points

        return learned_points(self._shape, params, x, y, psf=self._psf, derivatives=derivatives)

    def _on_grid(self, params: np.ndarray, shape: tuple[int, int], psf: Any, **where: str) -> Any:
        from galmorph.rendering.learned_model import learned_grid

        return learned_grid(self._shape, params, shape, psf=psf, **where)

    def derived(
        self, params: np.ndarray, stds: np.ndarray
    ) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Sérsic index and ellipticity of the profile that the network bends.

        Parameters
        ----------
        params, stds : array, shape (N, P)

        Returns
        -------
        dict of str to (array, array)
            ``n`` and ``ellip``, with standard deviations, shape (N,).
        """
        decoder = self._shape.vae.decoder
        first = len(_GEOMETRY)
        n = np.exp(decoder.index[0] + decoder.index[1] * params[:, first]).clip(0.2, 8.0)
        q = 1 / (1 + np.exp(-(decoder.ratio[0] + decoder.ratio[1] * params[:, first + 1])))
        return {
            "n": (n, n * decoder.index[1] * stds[:, first]),
            "ellip": (1 - q, q * (1 - q) * decoder.ratio[1] * stds[:, first + 1]),
        }

    def render_misfit(
        self,
        shape: tuple[int, int],
        *,
        params: np.ndarray | None = None,
        psf: PSF | Sequence[PSF] | None = None,
    ) -> np.ndarray:
        """How far the model may be off in each pixel (1 sigma), as the network has learned it.

        Parameters
        ----------
        shape, params, psf
            As for `render`.

        Returns
        -------
        array
            In the shape that `render` gives, in the unit of the image.

        Notes
        -----
        The standard deviation of Regier et al. (2015), for a known noise: a fraction of the light,
        given by the latents, that changes with the elliptical radius.  It is that of the images
        on which the network was trained.
        """
        from galmorph.rendering.learned_model import misfit_fraction

        params, psf, single = self._drawn_with(params, psf)
        shape = _check_shape(shape)
        images = np.abs(self._on_grid(params, shape, psf)) * misfit_fraction(
            self._shape, params, shape
        )
        return images[0] if single else images
