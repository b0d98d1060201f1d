"""What follows from the parameters of a galaxy: for `FitResult.derive`.

Each function here makes a function of `galmorph.posterior.Draws`, so that a derived quantity
comes with its posterior.  All are of the galaxy itself, before the PSF.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from galmorph.posterior import Draws

__all__ = ["aperture_flux", "concentration", "ellipticity", "light_radius", "magnitude"]

Derivation = Callable[[Draws], np.ndarray]

#: Annuli of equal light, and points on each, by which light is measured.
_ANNULI, _POINTS = 128, 32
#: Draws that are worked on at once.
_CHUNK = 256


def magnitude(zero_point: float) -> Derivation:
    """Total magnitude.

    Parameters
    ----------
    zero_point : float
        Magnitude of a flux of 1.

    Returns
    -------
    callable
        NaN where the flux is not positive.

    Examples
    --------
    >>> import numpy as np
    >>> from galmorph import GaussianGalaxy2D, fit_images
    >>> from galmorph.derived import magnitude
    >>> image = GaussianGalaxy2D(flux=300, x_0=15, y_0=16, r_eff=3).render((31, 31))
    >>> result = fit_images(image, GaussianGalaxy2D(), uncertainty=0.1)
    >>> print(round(result.derive(magnitude(25.0)).mean[0], 1))
    18.8
    """

    def of(draws: Draws) -> np.ndarray:
        flux = draws["flux"]
        return zero_point - 2.5 * np.log10(np.where(flux > 0, flux, np.nan))

    return of


def ellipticity() -> Derivation:
    """1 - b/a: of the galaxy, of the profile that a network bends, or of the light of two parts.

    Returns
    -------
    callable

    Examples
    --------
    >>> import numpy as np
    >>> from galmorph import GaussianGalaxy2D, fit_images
    >>> from galmorph.derived import ellipticity
    >>> image = GaussianGalaxy2D(flux=300, x_0=15, y_0=16, r_eff=3, ellip=0.4).render((31, 31))
    >>> result = fit_images(image, GaussianGalaxy2D(), uncertainty=0.1)
    >>> print(round(result.derive(ellipticity()).mean[0], 2))
    0.4
    """

    def of(draws: Draws) -> np.ndarray:
        if "ellip" in draws:
            return draws["ellip"]
        if "bulge_fraction" in draws:  # by the flux
            share = draws["bulge_fraction"]
            return share * draws["ellip_bulge"] + (1 - share) * draws["ellip_disk"]
        flat = draws.params.reshape(-1, draws.params.shape[2])
        derived = draws.model.derived(flat, np.zeros_like(flat))
        if "ellip" not in derived:
            raise ValueError(f"{type(draws.model).__name__} has no ellipticity")
        return derived["ellip"][0].reshape(draws.array.shape[:2])

    return of


def aperture_flux(radius: float) -> Derivation:
    """Flux within a circle about the centre.

    Parameters
    ----------
    radius : float
        In pixels.

    Returns
    -------
    callable

    Examples
    --------
    >>> import numpy as np
    >>> from galmorph import GaussianGalaxy2D, fit_images
    >>> from galmorph.derived import aperture_flux
    >>> image = GaussianGalaxy2D(flux=300, x_0=15, y_0=16, r_eff=3).render((31, 31))
    >>> result = fit_images(image, GaussianGalaxy2D(), uncertainty=0.1)
    >>> bool(abs(result.derive(aperture_flux(3.0)).mean[0] - 150) < 3)
    True
    """
    if not radius > 0:
        raise ValueError(f"radius must be positive, not {radius!r}")

    def of(draws: Draws) -> np.ndarray:
        def inside(place: np.ndarray, light: np.ndarray) -> np.ndarray:
            return (light * (place < radius)).sum(1)

        return draws["flux"] * _over_draws(draws, inside)

    return of


def light_radius(fraction: float = 0.5) -> Derivation:
    """Radius of the circle about the centre that holds a fraction of the light.

    Parameters
    ----------
    fraction : float, optional
        0.5: the half-light radius.

    Returns
    -------
    callable
        In pixels.

    Examples
    --------
    >>> import numpy as np
    >>> from galmorph import GaussianGalaxy2D, fit_images
    >>> from galmorph.derived import light_radius
    >>> image = GaussianGalaxy2D(flux=300, x_0=15, y_0=16, r_eff=3).render((31, 31))
    >>> result = fit_images(image, GaussianGalaxy2D(), uncertainty=0.1)
    >>> print(round(result.derive(light_radius(0.5)).mean[0], 1))
    3.0
    """
    if not 0 < fraction < 1:
        raise ValueError(f"fraction must be between 0 and 1, not {fraction!r}")
    return lambda draws: _over_draws(draws, lambda place, light: _radius(place, light, fraction))


def concentration(inner: float = 0.2, outer: float = 0.8) -> Derivation:
    """Concentration, 5 log10 of the ratio of two radii.

    Parameters
    ----------
    inner, outer : float, optional
        Fractions of the light within these radii (Conselice 2003, ApJS 147, 1).

    Returns
    -------
    callable

    Examples
    --------
    >>> import numpy as np
    >>> from galmorph import GaussianGalaxy2D, fit_images
    >>> from galmorph.derived import concentration
    >>> image = GaussianGalaxy2D(flux=300, x_0=15, y_0=16, r_eff=3).render((31, 31))
    >>> result = fit_images(image, GaussianGalaxy2D(), uncertainty=0.1)
    >>> exact = 2.5 * np.log10(np.log(1 - 0.8) / np.log(1 - 0.2))
    >>> bool(abs(result.derive(concentration()).mean[0] - exact) < 0.02)
    True
    """
    if not 0 < inner < outer < 1:
        raise ValueError("0 < inner < outer < 1 is needed")

    def ratio(place: np.ndarray, light: np.ndarray) -> np.ndarray:
        radii = (_radius(place, light, f) for f in (outer, inner))
        return 5.0 * np.log10(next(radii) / next(radii))

    return lambda draws: _over_draws(draws, ratio)


def _over_draws(draws: Draws, measure: Callable) -> np.ndarray:
    """Apply ``measure(place (m, K), light (m, K)) -> (m,)`` to parcels of light of all draws."""
    flat = draws.params.reshape(-1, draws.params.shape[2])
    found = np.full(len(flat), np.nan)
    for rows in np.array_split(np.arange(len(flat)), max(1, -(-len(flat) // _CHUNK))):
        good = rows[np.isfinite(flat[rows]).all(1)]
        if good.size:
            found[good] = measure(*_parcels(draws.model, flat[good]))
    return found.reshape(draws.array.shape[:2])


def _radius(place: np.ndarray, light: np.ndarray, fraction: float) -> np.ndarray:
    order = np.argsort(place, axis=1)
    place = np.take_along_axis(place, order, 1)
    light = np.take_along_axis(light, order, 1)
    within = light.cumsum(1) - 0.5 * light
    return np.array([np.interp(fraction, w, p) for w, p in zip(within, place, strict=True)])


def _parcels(model, params: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Parcels of light: distance from the centre (m, K) and share of the flux (m, K)."""
    if hasattr(model, "shape") and hasattr(model.shape, "decoder"):
        return _learned_parcels(model, params)
    at = {name: i for i, name in enumerate(model.param_names)}
    places, lights = [], []
    for profile in model._profiles:
        share = np.ones(len(params))
        name = profile.get("share")
        if name is not None:
            share = params[:, at[name.lstrip("-")]]
            share = 1 - share if name.startswith("-") else share
        if profile["r"] is None:
            places.append(np.zeros((len(params), 1)))
            lights.append(share[:, None])
            continue
        n = profile.get("n", 1.0)
        index = params[:, at[n]] if isinstance(n, str) else np.full(len(params), n)
        r = params[:, at[profile["r"]]]
        q = 1 - params[:, at[profile.get("ellip", "ellip")]]
        u, angle = _annuli(index)
        stretch = np.hypot(np.cos(angle), q[:, None] * np.sin(angle))
        place = (r[:, None] * u)[:, :, None] * stretch[:, None]
        places.append(place.reshape(len(params), -1))
        count = place[0].size
        lights.append(np.repeat(share[:, None] / count, count, axis=1))
    return np.concatenate(places, 1), np.concatenate(lights, 1)


def _annuli(n: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Radii of annuli of equal light in half-light radii (m, A), and angles (T,)."""
    from scipy.special import gammaincinv

    share = (np.arange(_ANNULI) + 0.5) / _ANNULI
    b = gammaincinv(2 * n, 0.5)
    u = (gammaincinv(2 * n[:, None], share) / b[:, None]) ** n[:, None]
    angle = 2 * np.pi * (np.arange(_POINTS) + 0.5) / _POINTS
    return u, angle


def _learned_parcels(model, params: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    import torch

    from galmorph.rendering.learned import Geometry, canonical_light
    from galmorph.rendering.learned_model import to_profile

    with torch.no_grad():
        decoder = model.shape.decoder(torch.float64)
        geometry, _, z = to_profile(decoder, torch.as_tensor(params))
        u, angle = _annuli(geometry.n.numpy())
        canonical = np.stack([np.cos(angle), np.sin(angle)], -1)
        points = (u[:, :, None, None] * canonical).reshape(-1, 2)
        count = u.shape[1] * len(angle)
        row = torch.arange(len(params)).repeat_interleave(count)
        one, zero = torch.ones_like(geometry.n), torch.zeros_like(geometry.n)
        unit = Geometry(zero, zero, one, one, zero, geometry.n)
        drawn, own = canonical_light(unit, torch.as_tensor(points), row, decoder.coefficients(z))
        light = (drawn / own).view(len(params), count).numpy()
        stretch = np.hypot(np.cos(angle), geometry.q.numpy()[:, None] * np.sin(angle))
        place = (geometry.r.numpy()[:, None] * u)[:, :, None] * stretch[:, None]
    return place.reshape(len(params), -1), light / light.sum(1, keepdims=True)
