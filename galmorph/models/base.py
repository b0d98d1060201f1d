"""What all galaxy models share: a PSF, units, model sets and rendering."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import astropy.units as u
import numpy as np
from astropy.modeling.core import Fittable2DModel

from galmorph.psf import PSF

if TYPE_CHECKING:
    from galmorph.rendering.parameters import Ellipse

__all__ = ["GalaxyModel"]


class GalaxyModel(Fittable2DModel):
    """Base class of the galaxy models.

    A subclass declares its `~astropy.modeling.Parameter` objects, with ``flux``, ``x_0``
    and ``y_0`` first, and says in ``_profiles`` which of them make each elliptical profile.

    Parameters
    ----------
    *args, **kwargs
        Parameters, and what `~astropy.modeling.Fittable2DModel` takes.
    psf : PSF, array, or model, optional
        The point-spread function; see `galmorph.PSF`.  Without one the light is integrated
        over the pixels exactly.
    """

    _profiles: ClassVar[tuple[dict[str, Any], ...]] = ()

    def __init__(self, *args: Any, psf: Any = None, **kwargs: Any) -> None:
        self._psf = None if psf is None else PSF.from_any(psf)
        super().__init__(*args, **kwargs)

    @property
    def psf(self) -> PSF | None:
        """The point-spread function, or None."""
        return self._psf

    @psf.setter
    def psf(self, psf: Any) -> None:
        self._psf = None if psf is None else PSF.from_any(psf)

    @classmethod
    def ellipses(cls) -> list[Ellipse]:
        """How the model is drawn (for the renderer; this imports torch)."""
        from galmorph.rendering.parameters import Ellipse

        return [Ellipse(**profile) for profile in cls._profiles]

    def default_bounds(self) -> dict[str, tuple[float | None, float | None]]:
        """Bounds of the parameters where the user has set none."""
        return {name: tuple(getattr(type(self), name).bounds) for name in self.param_names}

    # -- units -----------------------------------------------------------------------

    @property
    def input_units(self) -> dict[str, u.UnitBase] | None:
        """The unit of x and y, from that of the centre."""
        if self.x_0.input_unit is None:
            return None
        return {"x": self.x_0.input_unit, "y": self.y_0.input_unit}

    def _parameter_units_for_data_units(self, inputs_unit, outputs_unit):
        units = {"flux": outputs_unit["z"], "x_0": inputs_unit["x"], "y_0": inputs_unit["y"]}
        for profile in self._profiles:
            if profile["r"] is not None:
                units[profile["r"]] = inputs_unit["x"]
                units[profile.get("theta", "theta")] = u.rad
        return units

    def _lengths(self) -> set[str]:
        return {"x_0", "y_0"} | {p["r"] for p in self._profiles if p["r"] is not None}

    def _bare(self, x, y, params):
        """Arrays without units, and the unit of the result."""
        unit = getattr(params[0], "unit", None)
        length = getattr(params[1], "unit", None)
        if length is not None:
            x, y = (u.Quantity(a, length).value for a in (x, y))
        bare = []
        for name, p in zip(self.param_names, params, strict=True):
            if isinstance(p, u.Quantity):
                if name in self._lengths() and length is not None:
                    p = p.to_value(length)
                elif name.startswith("theta"):
                    p = p.to_value(u.rad)
                else:
                    p = p.value
            bare.append(np.asarray(p, dtype=float))
        return np.asarray(x, dtype=float), np.asarray(y, dtype=float), bare, unit

    # -- evaluation ------------------------------------------------------------------

    # not annotated: astropy reads units from the annotations of evaluate
    def evaluate(self, x, y, *params):
        """The light in the pixels centred on ``x``, ``y``.

        Parameters
        ----------
        x, y : array-like
            Centres of pixels.  Points on a grid with steps of one pixel are drawn at
            once, whatever their order; others are summed wave by wave, which is slower.
        *params : array-like
            The parameters, in the order of ``param_names``.

        Returns
        -------
        array or `~astropy.units.Quantity`
            Flux per pixel, in the shape of ``x``.
        """
        x, y, bare, unit = self._bare(x, y, params)
        result = _over_sets(lambda x, y, p: self._at_points(p, x, y), x, y, bare)
        return result if unit is None else u.Quantity(result, unit, copy=False)

    def fit_deriv(self, x: Any, y: Any, *params: Any) -> list[np.ndarray]:
        """Derivatives by every parameter at points, for fitters.

        Parameters
        ----------
        x, y : array-like
            Centres of pixels.
        *params : float
            The parameters of one model.

        Returns
        -------
        list of array
            One for each parameter, in the shape of ``x``.
        """
        x, y, bare, _ = self._bare(x, y, params)
        x, y = np.broadcast_arrays(x, y)
        p = np.array([float(np.ravel(b)[0]) for b in bare])[None]
        _, derivatives = self._at_points(p, x.ravel(), y.ravel(), derivatives=True)
        return [d.reshape(x.shape) for d in derivatives[0]]

    def render(
        self,
        shape: tuple[int, int],
        *,
        params: np.ndarray | None = None,
        psf: PSF | Sequence[PSF] | None = None,
        device: str = "cpu",
        dtype: str = "float64",
    ) -> np.ndarray:
        """Draw images, without background.

        Parameters
        ----------
        shape : tuple of int
            (ny, nx) of the images; pixel (0, 0) is centred on (x, y) = (0, 0).
        params : array, shape (N, P), optional
            Parameters of many galaxies; the model's own by default.
        psf : PSF or sequence of PSF, optional
            In place of the model's own: shared, or one a galaxy.
        device : str, optional
            Where torch draws: ``"cpu"``, ``"cuda"`` ...
        dtype : {"float64", "float32"}, optional
            Precision.

        Returns
        -------
        array, shape (ny, nx), or (N, ny, nx) for a model set or given ``params``

        Raises
        ------
        ValueError
            If the shape is not that of an image, ``params`` has another number of columns
            than the model has parameters, or there are more or fewer PSFs than galaxies.

        Examples
        --------
        >>> from galmorph import SersicGalaxy2D
        >>> model = SersicGalaxy2D(flux=100, x_0=20, y_0=20, r_eff=3, n=1)
        >>> image = model.render((41, 41))
        >>> image.shape, round(float(image.sum()))
        ((41, 41), 100)
        """
        params, psf, single = self._drawn_with(params, psf)
        images = self._on_grid(params, _check_shape(shape), psf, device=device, dtype=dtype)
        return images[0] if single else images

    def _drawn_with(self, params: Any, psf: Any) -> tuple[np.ndarray, Any, bool]:
        """Parameters (N, P), PSFs, and whether one image is asked for."""
        single = params is None and len(self) == 1
        if params is None:
            _, _, bare, _ = self._bare(0.0, 0.0, [_value(self, n) for n in self.param_names])
            params = np.stack([np.ravel(b) for b in bare], -1)
        params = np.atleast_2d(np.asarray(params, dtype=float))
        if params.ndim != 2 or params.shape[1] != len(self.param_names):
            raise ValueError(
                f"params must be of shape (N, {len(self.param_names)}), not {params.shape}"
            )
        psf = self._psf if psf is None else psf
        if psf is not None and not isinstance(psf, PSF):
            psf = PSF.from_any(psf) if _is_one_psf(psf) else [PSF.from_any(p) for p in psf]
        if isinstance(psf, list) and len(psf) != len(params):
            raise ValueError(f"there is one PSF or one a galaxy, not {len(psf)} for {len(params)}")
        return params, psf, single

    def _at_points(
        self, params: np.ndarray, x: np.ndarray, y: np.ndarray, *, derivatives: bool = False
    ) -> Any:
        """Light (N, m) of parameters (N, P) at points (m,), and derivatives (N, P, m)."""
        from galmorph.rendering.evaluate import evaluate_points

        return evaluate_points(
            self.ellipses(),
            self.param_names,
            params,
            x,
            y,
            psf=self._psf,
            derivatives=derivatives,
        )

    def _on_grid(self, params: np.ndarray, shape: tuple[int, int], psf: Any, **where: str) -> Any:
        """Images (N, ny, nx) of parameters (N, P)."""
        from galmorph.rendering.evaluate import evaluate_grid

        return evaluate_grid(self.ellipses(), self.param_names, params, shape, psf=psf, **where)

    def derived(
        self, params: np.ndarray, stds: np.ndarray
    ) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Quantities in the names of the field that are functions of the parameters.

        Parameters
        ----------
        params, stds : array, shape (N, P)
            Parameters and their standard deviations.

        Returns
        -------
        dict of str to (array, array)
            Values and standard deviations, shape (N,); empty but for learned models.
        """
        return {}

    def render_misfit(
        self,
        shape: tuple[int, int],
        *,
        params: np.ndarray | None = None,
        psf: PSF | Sequence[PSF] | None = None,
    ) -> np.ndarray:
        """How far the model may be off in each pixel; zero, but for learned models.

        Parameters
        ----------
        shape, params, psf
            As for `render`.

        Returns
        -------
        array
            In the shape that `render` gives.
        """
        return np.zeros_like(self.render(shape, params=params, psf=psf))


def _value(model: GalaxyModel, name: str) -> Any:
    parameter = getattr(model, name)
    return parameter.quantity if parameter.unit is not None else parameter.value


def _check_shape(shape: Any) -> tuple[int, int]:
    try:
        ny, nx = (operator.index(side) for side in shape)
    except (TypeError, ValueError):
        ny = nx = 0
    if ny < 1 or nx < 1:
        raise ValueError(f"shape must be (ny, nx), two positive integers, not {shape!r}")
    return ny, nx


def _is_one_psf(psf: Any) -> bool:
    return not isinstance(psf, list | tuple) and np.ndim(psf) != 3


def _over_sets(function, x, y, params):
    """Apply ``function(x (m,), y (m,), params (B, P)) -> (B, m)`` to a model or a model set."""
    x, y = np.broadcast_arrays(x, y)
    p_shape = np.broadcast_shapes(*(p.shape for p in params))
    n_sets = int(np.prod(p_shape))
    if n_sets == 1:
        table = np.array([[float(np.ravel(p)[0]) for p in params]])
        shape = np.broadcast_shapes(x.shape, p_shape)
        x, y = (np.broadcast_to(a, shape) for a in (x, y))
        return function(x.ravel(), y.ravel(), table)[0].reshape(shape)
    shape = np.broadcast_shapes(x.shape, p_shape)
    lead = len(shape) - len(p_shape)
    axes = [i + lead for i, length in enumerate(p_shape) if length > 1]
    if len(axes) > 1:  # several axes of sets: one galaxy at each point of them
        flat = [np.broadcast_to(p, shape) for p in params]
        x, y = (np.broadcast_to(a, shape) for a in (x, y))
        result = np.empty(shape)
        for index in np.ndindex(shape):
            table = np.array([[f[index] for f in flat]])
            result[index] = function(x[index][None], y[index][None], table)[0, 0]
        return result
    axis = axes[0]
    table = np.stack([np.broadcast_to(p, p_shape).ravel() for p in params], -1)
    aligned = (1,) * (len(shape) - x.ndim) + x.shape
    x, y = x.reshape(aligned), y.reshape(aligned)
    rest = tuple(s for i, s in enumerate(shape) if i != axis)
    if x.shape[axis] == 1:  # all models at the same points
        points = [np.broadcast_to(np.take(a, 0, axis), rest).ravel() for a in (x, y)]
        result = function(*points, table)
    else:
        x, y = (np.moveaxis(np.broadcast_to(a, shape), axis, 0) for a in (x, y))
        result = np.concatenate(
            [function(x[i].ravel(), y[i].ravel(), table[i : i + 1]) for i in range(len(table))]
        )
    return np.moveaxis(result.reshape(len(table), *rest), 0, axis)
