"""From the parameters of a model to what the renderer draws, and back.

A model says with `Ellipse` which of its parameters make each profile.  The renderer knows a
profile by the matrix of its half-light ellipse (`galmorph.rendering.Component`).  The fitter
walks in coordinates in which the likelihood is close to a parabola: for a free ellipse, the
logarithm of its circularised radius and eta = -ln(q) (cos 2 theta, sin 2 theta), which are
regular where the ellipse is round; and the logarithm of n.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from galmorph.rendering.fourier import Component
from galmorph.rendering.sersic import N_RANGE

__all__ = ["Coordinates", "Ellipse", "components", "raw_jacobian"]

#: Largest ellipticity that is ever drawn.
MAX_ELLIP = 0.995
_MAX_ETA = 5.2983  # -ln(1 - MAX_ELLIP)


@dataclass(frozen=True)
class Ellipse:
    """Which parameters of a model make one elliptical profile.

    Attributes
    ----------
    r, ellip, theta : str or None
        Names of the half-light semi-major axis, ellipticity and angle; ``r`` None is a point.
    n : str or float
        Name of the Sérsic index, or its fixed value.
    share : str or None
        Name of the share of the light; with a leading minus, one minus it.
    """

    r: str | None
    n: str | float = 1.0
    ellip: str = "ellip"
    theta: str = "theta"
    share: str | None = None


def _shape_of(r, ellip, theta):
    """(xx, xy, yy) of the half-light ellipse."""
    q = 1.0 - ellip
    cos, sin = torch.cos(theta), torch.sin(theta)
    major, minor = r * r, (r * q) ** 2
    return torch.stack(
        [
            major * cos**2 + minor * sin**2,
            (major - minor) * cos * sin,
            major * sin**2 + minor * cos**2,
        ],
        -1,
    )


def components(
    ellipses: Sequence[Ellipse], names: Sequence[str], params: torch.Tensor
) -> list[Component]:
    """What to draw for parameters (B, P), in the order of ``names``.

    Parameters
    ----------
    ellipses : sequence of Ellipse
    names : sequence of str
    params : tensor, shape (B, P)

    Returns
    -------
    list of Component

    Examples
    --------
    >>> import torch
    >>> from galmorph.rendering.parameters import Ellipse, components
    >>> names = ("flux", "x_0", "y_0", "r_eff", "n", "ellip", "theta")
    >>> p = torch.tensor([[1.0, 0.0, 0.0, 2.0, 1.0, 0.5, 0.0]])
    >>> components([Ellipse("r_eff", "n")], names, p)[0].shape
    tensor([[4., 0., 1.]])
    """
    column = dict(zip(names, params.unbind(-1), strict=True))
    drawn = []
    for e in ellipses:
        weight = None
        if e.share is not None:
            weight = 1.0 - column[e.share[1:]] if e.share[0] == "-" else column[e.share]
        if e.r is None:
            drawn.append(Component(None, None, weight))
            continue
        ellip = column[e.ellip].clamp_max(MAX_ELLIP)  # negative: b is larger than a
        shape = _shape_of(column[e.r].clamp_min(1e-3), ellip, column[e.theta])
        n = column[e.n].clamp(*N_RANGE) if isinstance(e.n, str) else e.n
        drawn.append(Component(shape, n, weight))
    return drawn


def _raw_rows(ellipses: Sequence[Ellipse]) -> list[tuple[str, int]]:
    """What each raw derivative of the renderer is by: (kind, index of the ellipse)."""
    rows = [("x_0", -1), ("y_0", -1)]
    for i, e in enumerate(ellipses):
        if e.share is not None:
            rows.append(("share", i))
        if e.r is not None:
            rows += [("xx", i), ("xy", i), ("yy", i)]
            if isinstance(e.n, str):
                rows.append(("n", i))
    return rows


def raw_jacobian(
    ellipses: Sequence[Ellipse], names: Sequence[str], params: torch.Tensor
) -> torch.Tensor:
    """Derivative of the renderer's raw parameters by the model's: (B, R, P).

    Parameters
    ----------
    ellipses, names, params
        As for `components`.

    Returns
    -------
    tensor, shape (B, R, P)
        R in the order of `galmorph.rendering.RawImages.derivatives`.

    Examples
    --------
    >>> import torch
    >>> from galmorph.rendering.parameters import Ellipse, raw_jacobian
    >>> names = ("flux", "x_0", "y_0", "r_eff", "n", "ellip", "theta")
    >>> p = torch.tensor([[1.0, 0.0, 0.0, 2.0, 1.0, 0.5, 0.0]])
    >>> raw_jacobian([Ellipse("r_eff", "n")], names, p).shape
    torch.Size([1, 6, 7])
    """
    at = {name: i for i, name in enumerate(names)}
    rows = _raw_rows(ellipses)
    jacobian = params.new_zeros((params.shape[0], len(rows), len(names)))
    where = {row: i for i, row in enumerate(rows)}
    jacobian[:, 0, at["x_0"]] = 1.0
    jacobian[:, 1, at["y_0"]] = 1.0
    for i, e in enumerate(ellipses):
        if e.share is not None:
            sign, name = (-1.0, e.share[1:]) if e.share[0] == "-" else (1.0, e.share)
            jacobian[:, where["share", i], at[name]] = sign
        if e.r is None:
            continue
        if isinstance(e.n, str):
            jacobian[:, where["n", i], at[e.n]] = 1.0
        r, ellip, theta = (params[:, at[name]] for name in (e.r, e.ellip, e.theta))
        r, q = r.clamp_min(1e-3), 1.0 - ellip.clamp_max(MAX_ELLIP)
        cos, sin = torch.cos(theta), torch.sin(theta)
        first = where["xx", i]
        block = slice(first, first + 3)
        jacobian[:, block, at[e.r]] = _shape_of(r, 1.0 - q, theta) * (2.0 / r)[:, None]
        down = -2.0 * r * r * q
        jacobian[:, block, at[e.ellip]] = torch.stack(
            [down * sin**2, -down * cos * sin, down * cos**2], -1
        )
        turn = r * r * (1.0 - q * q)
        jacobian[:, block, at[e.theta]] = torch.stack(
            [-2.0 * turn * cos * sin, turn * (cos**2 - sin**2), 2.0 * turn * cos * sin], -1
        )
    return jacobian


@dataclass
class _Block:
    """Some coordinates, the parameters that they make, and how."""

    kind: str  # "same", "log" or "ellipse"
    coordinates: list[int]
    parameters: list[int]
    ellipse: int = -1


@dataclass
class Coordinates:
    """The coordinates in which a fit walks.

    Parameters
    ----------
    ellipses : sequence of Ellipse
        How the model is drawn.
    names : sequence of str
        Its parameters.
    free : sequence of bool
        Which of them are fitted.
    native : set of str
        Parameters with bounds, priors or ties of their own: an ellipse that has one is
        walked in its own parameters, so that these hold exactly.
    linear_flux : bool
        The flux is solved for, and is not a coordinate.
    tie : callable, optional
        Sets tied parameters: ``params (B, P) -> params (B, P)``.
    """

    ellipses: Sequence[Ellipse]
    names: Sequence[str]
    free: Sequence[bool]
    native: set[str] = field(default_factory=set)
    linear_flux: bool = True
    tie: Callable[[torch.Tensor], torch.Tensor] | None = None

    def __post_init__(self) -> None:
        at = {name: i for i, name in enumerate(self.names)}
        self.blocks: list[_Block] = []
        taken: set[str] = {"flux"} if self.linear_flux else set()
        self.size = 0
        logarithmic = {e.r for e in self.ellipses} | {e.n for e in self.ellipses}
        for i, e in enumerate(self.ellipses):
            trio = [e.r, e.ellip, e.theta]
            whole = e.r is not None and all(self.free[at[t]] for t in trio)
            if whole and not self.native & set(trio):
                self._add("ellipse", [at[t] for t in trio], i)
                taken |= set(trio)
        for name in self.names:
            if name not in taken and self.free[at[name]]:
                self._add("log" if name in logarithmic else "same", [at[name]])

    def _add(self, kind: str, parameters: list[int], ellipse: int = -1) -> None:
        coordinates = list(range(self.size, self.size + len(parameters)))
        self.blocks.append(_Block(kind, coordinates, parameters, ellipse))
        self.size += len(parameters)

    def from_params(self, params: torch.Tensor) -> torch.Tensor:
        """Coordinates (B, U) of parameters (B, P)."""
        u = params.new_empty((params.shape[0], self.size))
        for block in self.blocks:
            p = params[:, block.parameters]
            if block.kind == "log":
                p = torch.log(p.clamp_min(1e-3))
            elif block.kind == "ellipse":
                g = -torch.log1p(-p[:, 1].clamp(0.0, MAX_ELLIP))
                p = torch.stack(
                    [
                        torch.log(p[:, 0].clamp_min(1e-3)) - 0.5 * g,
                        g * torch.cos(2 * p[:, 2]),
                        g * torch.sin(2 * p[:, 2]),
                    ],
                    -1,
                )
            u[:, block.coordinates] = p
        return u

    def to_params(self, u: torch.Tensor, template: torch.Tensor) -> torch.Tensor:
        """Parameters (B, P) at coordinates; those that are not walked come from ``template``."""
        params = template.clone()
        for block in self.blocks:
            v = u[:, block.coordinates]
            if block.kind == "log":
                v = torch.exp(v)
            elif block.kind == "ellipse":
                g = torch.hypot(v[:, 1], v[:, 2])
                theta = 0.5 * torch.atan2(v[:, 2], v[:, 1])
                v = torch.stack([torch.exp(v[:, 0] + 0.5 * g), -torch.expm1(-g), theta], -1)
            params[:, block.parameters] = v
        return params if self.tie is None else self.tie(params)

    def params_jacobian(self, u: torch.Tensor, params: torch.Tensor) -> torch.Tensor:
        """Derivative of the parameters by the coordinates, (B, P, U)."""
        jacobian = u.new_zeros((u.shape[0], len(self.names), self.size))
        for block in self.blocks:
            if block.kind == "ellipse":
                _, eta1, eta2 = u[:, block.coordinates].unbind(-1)
                g = torch.hypot(eta1, eta2).clamp_min(1e-6)
                r = params[:, block.parameters[0]]
                zero = torch.zeros_like(g)
                local = torch.stack(
                    [
                        torch.stack([r, 0.5 * r * eta1 / g, 0.5 * r * eta2 / g], -1),
                        torch.exp(-g)[:, None] * torch.stack([zero, eta1 / g, eta2 / g], -1),
                        torch.stack([zero, -eta2, eta1], -1) / (2 * g * g)[:, None],
                    ],
                    -2,
                )
                for i, p in enumerate(block.parameters):
                    jacobian[:, p, block.coordinates] = local[:, i]
            else:
                p, c = block.parameters[0], block.coordinates[0]
                jacobian[:, p, c] = params[:, p] if block.kind == "log" else 1.0
        if self.tie is not None:
            jacobian = self._through_tie(jacobian, params)
        return jacobian

    def _through_tie(self, jacobian: torch.Tensor, params: torch.Tensor) -> torch.Tensor:
        """Add the rows of tied parameters, by central differences of the tie."""
        result = jacobian.clone()
        for p in range(len(self.names)):
            step = 1e-5 * params[:, p].abs().clamp_min(1e-3)
            up, down = params.clone(), params.clone()
            up[:, p] += step
            down[:, p] -= step
            slope = (self.tie(up) - self.tie(down)) / (2 * step)[:, None]
            slope[:, p] = 0.0
            result += slope[:, :, None] * jacobian[:, p, None, :]
        return result

    def chain(self, u: torch.Tensor, params: torch.Tensor) -> torch.Tensor:
        """Derivative of the renderer's raw parameters by the coordinates, (B, R, U)."""
        by_params = raw_jacobian(self.ellipses, self.names, params)
        chain = by_params @ self.params_jacobian(u, params)
        rows = _raw_rows(self.ellipses)
        for block in self.blocks:
            if block.kind == "ellipse":  # regular where the ellipse is round
                first = rows.index(("xx", block.ellipse))
                columns = slice(block.coordinates[0], block.coordinates[-1] + 1)
                chain[:, first : first + 3, columns] = _shape_by_eta(u[:, block.coordinates])
        return chain


def _shape_by_eta(v: torch.Tensor) -> torch.Tensor:
    """d(xx, xy, yy) by (ln r_circ, eta_1, eta_2): (B, 3, 3)."""
    size, e1, e2 = torch.exp(2 * v[:, 0]), v[:, 1], v[:, 2]
    g2 = e1 * e1 + e2 * e2
    g = torch.sqrt(g2)
    small = g < 1e-2
    safe = torch.where(small, torch.ones_like(g), g)
    cosh = torch.cosh(g)
    sinhc = torch.where(small, 1 + g2 / 6, torch.sinh(safe) / safe)
    third = torch.where(
        small, 1 / 3 + g2 / 30, (safe * torch.cosh(safe) - torch.sinh(safe)) / safe**3
    )
    xx, xy, yy = cosh + sinhc * e1, sinhc * e2, cosh - sinhc * e1
    rows = [
        torch.stack([2 * xx, (sinhc + third * e1) * e1 + sinhc, (sinhc + third * e1) * e2], -1),
        torch.stack([2 * xy, third * e1 * e2, sinhc + third * e2 * e2], -1),
        torch.stack([2 * yy, (sinhc - third * e1) * e1 - sinhc, (sinhc - third * e1) * e2], -1),
    ]
    return size[:, None, None] * torch.stack(rows, -2)
