"""Words on figures: parameters, units, and the summary of a fit."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..flags import decode_flags

if TYPE_CHECKING:
    from ..results import FitResult

# Class of a parameter, by the first part of its name: (symbol, unit).
_SYMBOLS = {
    "flux": "F",
    "x": "x",
    "y": "y",
    "r": "r",
    "n": "n",
    "ellip": r"\epsilon",
    "theta": r"\theta",
    "z": "z",
}
_SUBSCRIPTS = {"eff": r"\mathrm{e}", "bulge": r"\mathrm{bulge}", "disk": r"\mathrm{disk}"}


def parameter_symbol(name: str) -> str:
    """Mathematical symbol of a parameter as matplotlib text, e.g. ``$r_\\mathrm{e}$``.

    Names that are not known are returned as they are.
    """
    if name == "bulge_fraction":
        return r"$B/T$"
    stem, _, subscript = name.partition("_")
    if not subscript and stem[:1] == "z" and stem[1:].isdigit():
        stem, subscript = "z", stem[1:]
    if stem not in _SYMBOLS:
        return name
    if not subscript:
        return f"${_SYMBOLS[stem]}$"
    if not subscript.isdigit():
        subscript = _SUBSCRIPTS.get(subscript, rf"\mathrm{{{subscript}}}")
    return f"${_SYMBOLS[stem]}_{{{subscript}}}$"


def parameter_unit(name: str, result: FitResult) -> str:
    """Unit in which a parameter is drawn: that of the data, pixels, degrees or nothing."""
    stem = name.partition("_")[0]
    if name == "flux":
        return unit_text(result.data_unit)
    if name != "bulge_fraction" and stem in ("x", "y", "r"):
        return "pixel"
    return "deg" if stem == "theta" else ""


def unit_text(unit: object) -> str:
    """A unit as matplotlib text; empty for none and dimensionless."""
    if unit is None:
        return ""
    if hasattr(unit, "to_string"):
        try:
            text = unit.to_string("latex_inline")
        except (ValueError, TypeError):  # a format that does not know this unit
            text = unit.to_string()
        return "" if text.strip("$") in ("", r"\mathrm{}") else text
    return str(unit)


def with_unit(text: str, unit: str) -> str:
    """Append a unit in brackets, if there is one."""
    return f"{text} [{unit}]" if unit else text


def brightness_label(unit: object) -> str:
    """Label of an axis that shows mean pixel values."""
    text = unit_text(unit)
    bases = {getattr(base, "name", "") for base in getattr(unit, "bases", [])}
    # A pixel value is per pixel already, unless its unit says that it is per solid angle.
    if bases & {"pix", "pixel", "arcsec", "arcmin", "mas", "sr", "deg", "rad"}:
        return f"Surface brightness [{text}]"
    return f"Surface brightness [{text} / pixel]" if text else "Surface brightness [1 / pixel]"


def model_name(result: FitResult) -> str:
    """Name of the fitted model."""
    return type(result.model).__name__


def galaxy_text(result: FitResult, i: int) -> str:
    """What to call a galaxy: by its id, which a part of a result keeps."""
    return f"Galaxy {result.ids[i]}"


def chi2_text(result: FitResult, i: int) -> str:
    """Reduced chi-square with what it is made of, e.g. ``χ²/dof = 1.02 (4080/4000)``."""
    ratio = reduced_chi2_text(result, i)
    if not ratio:
        return "χ²/dof undefined"
    return f"{ratio} ({float(result.chi2[i]):.0f}/{int(result.dof[i])})"


def reduced_chi2_text(result: FitResult, i: int) -> str:
    """Reduced chi-square, e.g. ``χ²/dof = 1.02``; empty where it is not defined."""
    chi2, dof = float(result.chi2[i]), float(result.dof[i])
    if not np.isfinite(chi2) or not dof > 0:
        return ""
    ratio = chi2 / dof
    return f"χ²/dof = {ratio:.2f}" if ratio < 100 else f"χ²/dof = {ratio:.3g}"


def flag_text(result: FitResult, i: int, *, most: int | None = None) -> str:
    """Names of the flags in words, at most so many; empty if none is set."""
    names = [name.lower().replace("_", " ") for name in decode_flags(int(result.flags[i]))]
    if most is not None and len(names) > most:
        names = [*names[:most], f"+{len(names) - most}"]
    return ", ".join(names)


def value_text(value: float, error: float) -> str:
    """``value ± error`` rounded to two significant digits of the error.

    Examples
    --------
    >>> from galmorph.plot.labels import value_text
    >>> value_text(3.14159, 0.0123)
    '3.142 ± 0.012'
    >>> value_text(12345.6, 432.1)
    '12350 ± 430'
    """
    if not np.isfinite(error) or error <= 0:
        return f"{value:.4g}".replace("-", "−")
    decimals = 1 - int(np.floor(np.log10(error)))
    # Rounding can carry into a new digit: 0.0997 becomes 0.10.
    decimals = 1 - int(np.floor(np.log10(round(error, decimals))))
    shown = max(decimals, 0)
    text = f"{round(value, decimals):.{shown}f} ± {round(error, decimals):.{shown}f}"
    return text.replace("-", "−")
