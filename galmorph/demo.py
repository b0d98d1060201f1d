"""The demonstration: galaxies of the Hubble eXtreme Deep Field, fitted with two models.

Everything is done as one would do it with an image of one's own: background,
noise and PSF come from the image itself, and the output says how far they can
be trusted.
"""

from __future__ import annotations

import os
import re
import sys
import textwrap
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from astropy.table import QTable

    from galmorph.detection import Detection, PSFEstimate
    from galmorph.results import FitResult

__all__ = ["Demo", "load_deep_field", "run_demo"]

__doctest_requires__ = {"load_deep_field": ["skimage"]}

#: Two bright stars, known by their diffraction spikes: (x, y), y counted upwards.
STARS = ((753.5, 293.1), (253.5, 704.9))
#: Side in pixels of the areas over which the correlation of the noise is measured:
#: about the half-light radius of a typical galaxy of the list.
NOISE_SCALE = 4
#: Improvement of chi-square that one more parameter has by chance in 1 of 370 galaxies.
SIGNIFICANT = 9.0
#: Galaxies on a page of the contact sheet.
_PER_PAGE = 30
#: Galaxies with figures of their own.
_N_SINGLE = 3


@dataclass(frozen=True)
class Demo:
    """What the demonstration found.

    Attributes
    ----------
    image : array, shape (872, 1000)
        The image as grey, linear light, y upwards.
    sigma : array, shape (872, 1000)
        Uncertainty of its pixels, as used in the fits.
    detection : Detection
        Sources, background and noise.
    psf : PSFEstimate
        The PSF and how it was made.
    noise_factor : float
        What the noise of single pixels was multiplied by, for their correlation.
    gaussian, sersic, learned : FitResult
        The fits, of the same galaxies in the same order, brightest first.
    table : `~astropy.table.QTable`
        The comparison, one row a galaxy.
    output : Path
        The folder.
    files : dict of str to str
        What each file in the folder is.
    """

    image: np.ndarray
    sigma: np.ndarray
    detection: Detection
    psf: PSFEstimate
    noise_factor: float
    gaussian: FitResult
    sersic: FitResult
    learned: FitResult
    table: QTable
    output: Path
    files: dict[str, str]


def load_deep_field() -> np.ndarray:
    """The Hubble eXtreme Deep Field that comes with scikit-image.

    It is the press release of September 2012 (NASA, ESA, G. Illingworth,
    D. Magee and P. Oesch, R. Bouwens, and the HUDF09 team), scaled down to
    about 0.14 arcsec a pixel: a colour JPEG, stretched for display, without
    WCS or units.

    Returns
    -------
    array of uint8, shape (872, 1000, 3)
        Red, green and blue, indexed [y, x, colour], y counted upwards.

    Raises
    ------
    ImportError
        If scikit-image is not installed.

    Examples
    --------
    >>> from galmorph.demo import load_deep_field
    >>> load_deep_field().shape
    (872, 1000, 3)
    """
    try:
        from skimage.data import hubble_deep_field
    except ImportError:
        raise ImportError(
            "the demo needs the image that comes with scikit-image; install it with: "
            'pip install "galmorph[demo]"   (or: pip install scikit-image)'
        ) from None
    return np.ascontiguousarray(hubble_deep_field()[::-1])


def grey_light(colour: np.ndarray) -> np.ndarray:
    """Mean of the three colours as linear light, on a scale of 0 to 255.

    Undoes the sRGB encoding of the file (IEC 61966-2-1), so that the result is
    proportional to the light that a screen would show.  The press office's own
    stretch stays in: nobody has written it down.

    Parameters
    ----------
    colour : array of uint8, shape (ny, nx, 3)
        Red, green and blue.

    Returns
    -------
    array of float, shape (ny, nx)

    Examples
    --------
    >>> import numpy as np
    >>> from galmorph.demo import grey_light
    >>> grey_light(np.array([[[0, 0, 0], [128, 128, 128], [255, 255, 255]]], np.uint8)).round(1)
    array([[  0.,  55., 255.]])
    """
    encoded = np.arange(256) / 255
    light = np.where(encoded <= 0.04045, encoded / 12.92, ((encoded + 0.055) / 1.055) ** 2.4)
    return (255 * light)[colour].mean(axis=2)


def pixel_noise(image: np.ndarray, detection: Detection, factor: float) -> np.ndarray:
    """Uncertainty of the pixels: the sky's, and larger where the encoding was steep.

    The errors of a JPEG (rounding, compression, what noise the picture had)
    are taken to be the same all over the *encoded* scale.  In linear light
    they then grow with the brightness as the slope of the decoding does.

    Parameters
    ----------
    image : array, shape (ny, nx)
        Linear light, of 0 to 255.
    detection : Detection
        For the noise of the sky.
    factor : float
        For the correlation of the pixels.

    Returns
    -------
    array, shape (ny, nx)
    """
    from scipy.ndimage import gaussian_filter

    # Smooth, so that a pixel's own noise does not set its weight.
    level = np.maximum(gaussian_filter(image, 1.0), 0) / 255
    sky = float(np.median(detection.background)) / 255

    def slope(light):  # d light / d encoded, a function of light
        return np.where(light <= 0.0031308, 1 / 12.92, 2.4 / 1.055 * light ** (1.4 / 2.4))

    return factor * detection.rms * np.maximum(slope(level) / slope(np.float64(sky)), 1.0)


def run_demo(
    output: str | os.PathLike = "galmorph-demo", *, n_max: int = 80, progress: bool = True
) -> Demo:
    """Detect and fit galaxies of the Hubble eXtreme Deep Field, offline.

    Parameters
    ----------
    output : path, optional
        Folder for catalogues and figures; made if it does not exist.  Files of
        an earlier run are replaced.
    n_max : int, optional
        How many galaxies are fitted, brightest first.
    progress : bool, optional
        Whether to say what is being done (standard error) and print the table
        (standard output).

    Returns
    -------
    Demo

    Raises
    ------
    ImportError
        If scikit-image is not installed.
    ValueError
        If ``n_max`` is not positive.
    OSError
        If the folder cannot be written to.

    Examples
    --------
    >>> from galmorph.demo import run_demo
    >>> demo = run_demo("galmorph-demo", n_max=60)  # doctest: +SKIP
    """
    if int(n_max) != n_max or n_max < 1:
        raise ValueError(f"n_max must be a positive integer, not {n_max!r}")
    started = time.perf_counter()
    say = _narrator(progress)
    say("reading the Hubble eXtreme Deep Field")
    colour = load_deep_field()
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)

    from galmorph.detection import detect, estimate_psf, noise_correlation

    image = grey_light(colour)
    say("detecting sources, measuring background and noise (photutils)")
    detection = detect(
        image, threshold=2.0, n_pixels=5, box_size=100, n_levels=16, contrast=0.02
    )  # fmt: skip
    factor, _ = noise_correlation(detection.data, mask=~detection.sky, scale=NOISE_SCALE)
    say(f"{len(detection)} sources; measuring the PSF from the smallest of them")
    psf = estimate_psf(image, detection)

    sigma = pixel_noise(image, detection, factor)
    fits = _fit(image, sigma, detection, psf, int(n_max), say)
    table = compare(*fits, detection, colour)
    demo = Demo(image, sigma, detection, psf, factor, *fits, table, output, files={})
    say("writing catalogues and figures")
    _write_catalogs(demo)
    _draw(demo, colour)
    (output / "README.txt").write_text(describe(demo), encoding="utf-8")
    if progress:
        print(summary(demo))
        print(f"\nDone in {time.perf_counter() - started:.0f} s; see {output / 'README.txt'}")
    return demo


def _narrator(progress: bool):
    def say(text: str) -> None:
        if progress:
            print(f"galmorph demo: {text}", file=sys.stderr, flush=True)

    return say


# -- the fits ----------------------------------------------------------------------------


def _fit(image, sigma, detection, psf, n_max, say) -> list[FitResult]:
    from galmorph.images import fit_images
    from galmorph.models import GaussianGalaxy2D, LearnedGalaxy2D, SersicGalaxy2D

    rows = brightest(detection, n_max)
    chosen = detection.catalog.select_labels(detection.catalog.labels[rows])
    results = []
    models = {
        "Gaussian": GaussianGalaxy2D(),
        "Sersic": SersicGalaxy2D(),
        "learned": LearnedGalaxy2D.from_pretrained(),
    }
    for name, model in models.items():
        say(f"fitting {len(rows)} galaxies with a {name} model")
        result = fit_images(
            image,
            model,
            positions=chosen,
            segmentation=detection.segmentation,
            uncertainty=sigma,
            psf=psf.psf,
            background="constant",
        )
        result.meta["image"] = "Hubble eXtreme Deep Field, display JPEG of scikit-image, y upwards"
        result.meta["psf"] = psf.statement
        results.append(result)
    return results


def brightest(detection: Detection, n_max: int) -> np.ndarray:
    """Rows of the brightest sources, less the two stars and what the edge cuts."""
    catalog = detection.catalog
    ny, nx = detection.data.shape
    inside = (
        (catalog.bbox_xmin > 0)
        & (catalog.bbox_ymin > 0)
        & (catalog.bbox_xmax < nx - 1)
        & (catalog.bbox_ymax < ny - 1)
    )
    x, y = detection.positions.T
    star = np.zeros(len(detection), dtype=bool)
    for x_star, y_star in STARS:
        star |= np.hypot(x - x_star, y - y_star) < 8
    order = np.argsort(catalog.segment_flux)[::-1]
    return order[(inside & ~star)[order]][:n_max]


def compare(gaussian, sersic, learned, detection: Detection, colour: np.ndarray) -> QTable:
    """All fits in one table: one row a galaxy, and by how much each is better than the last."""
    from astropy.table import QTable

    ours = sersic.to_table()
    columns = [
        name
        for name in ours.colnames
        if name.removesuffix("_err") in {"flux", "x_0", "y_0", "r_eff", "n", "ellip", "theta"}
    ]
    table = QTable({"label": np.asarray(sersic.ids)})
    for name in columns:
        table[name] = ours[name]
    theirs = gaussian.to_table()
    for name in ("flux", "flux_err", "r_eff", "r_eff_err"):
        table[f"{name}_gaussian"] = theirs[name]
    network = learned.to_table()
    for name in ("flux", "flux_err", "r_50", "r_50_err"):
        table[f"{name}_learned"] = network[name]
    table["chi2_dof_gaussian"] = gaussian.chi2 / gaussian.dof
    table["chi2_dof_sersic"] = sersic.chi2 / sersic.dof
    table["chi2_dof_learned"] = learned.chi2 / learned.dof
    table["delta_chi2"] = gaussian.chi2 - sersic.chi2
    table["delta_chi2_learned"] = sersic.chi2 - learned.chi2
    table["n_clipped"] = [
        int(np.sum((detection.segmentation.data == label) & (colour == 255).any(axis=2)))
        for label in sersic.ids
    ]
    table["flags"] = sersic.flags
    table.meta["delta_chi2"] = "chi2(Gaussian) - chi2(Sersic); the Sersic has one parameter more"
    table.meta["delta_chi2_learned"] = (
        f"chi2(Sersic) - chi2(learned); the learned model has {len(learned.param_names) - 7} "
        "parameters more, held by their prior"
    )
    table.meta["n_clipped"] = "pixels of the source that the JPEG clips (255) in any colour"
    return table


# -- files ---------------------------------------------------------------------------------


def _write_catalogs(demo: Demo) -> None:
    fits_of = {"gaussian": demo.gaussian, "sersic": demo.sersic, "learned": demo.learned}
    for name, result in fits_of.items():
        for kind in ("fits", "ecsv"):
            file = f"catalog-{name}.{kind}"
            result.write(demo.output / file, overwrite=True)
            how = "binary" if kind == "fits" else "the same as text"
            demo.files[file] = f"the {name} fits, one row a galaxy ({how})"
    demo.table.write(demo.output / "comparison.ecsv", overwrite=True)
    demo.files["comparison.ecsv"] = "all fits side by side, with delta_chi2 and n_clipped"
    from astropy.io import fits

    hdus = [
        fits.PrimaryHDU(),
        fits.ImageHDU(demo.image.astype(np.float32), name="SCI"),
        fits.ImageHDU(demo.sigma.astype(np.float32), name="ERR"),
        fits.ImageHDU(demo.detection.segmentation.data.astype(np.int32), name="SEGMENTS"),
        fits.ImageHDU(demo.psf.psf.data.astype(np.float32), name="PSF"),
    ]
    hdus[-1].header["OVERSAMP"] = (demo.psf.psf.oversampling, "samples per pixel")
    hdus[-1].header["PIXINCL"] = (True, "the pixel response is included")
    fits.HDUList(hdus).writeto(demo.output / "field.fits", overwrite=True)
    demo.files["field.fits"] = (
        "the grey image, its uncertainty, the segments and the PSF; try "
        "galmorph fit field.fits --detect --threshold 5 -o all.fits"
    )


def describe(demo: Demo) -> str:
    """Text of README.txt: what every file is, and what to make of the numbers."""
    n, better, _ = _verdict(demo)
    rms = float(np.nanmedian(demo.detection.rms))
    failed = int(np.sum(demo.sersic.failed | demo.gaussian.failed | demo.learned.failed))
    clipped = int(np.sum(np.asarray(demo.table["n_clipped"]) > 0))
    width = max(len(name) for name in demo.files) + 2
    files = [
        textwrap.fill(
            f"{name:<{width}}{text}", 88, initial_indent="  ", subsequent_indent=" " * (width + 2)
        )
        for name, text in demo.files.items()
    ]
    sections = {
        "The image": (
            "The Hubble eXtreme Deep Field, press release of September 2012 (NASA, ESA, "
            "G. Illingworth, D. Magee and P. Oesch, R. Bouwens, and the HUDF09 team; HubbleSite "
            "2012-37), as it comes with scikit-image: a colour JPEG of 1000 x 872 pixels of about "
            "0.14 arcsec (the field is 2.3 arcmin wide). It was made to be looked at. Its "
            "brightness was stretched for display, it has 8 bits, and no WCS. Its sRGB encoding "
            "was undone and the three colours were averaged with equal weight, which gives the "
            "light of a screen that shows the picture, on a scale of 0 to 255; the stretch that "
            "the press office gave it is not known and is still in it. So fluxes are in display "
            "units, profiles are flatter than the galaxies are, and a Sersic index is not to be "
            "compared with one from the calibrated data. What the demo shows is the method. "
            "y is counted from the bottom."
        ),
        "The galaxies": (
            f"photutils found {len(demo.detection)} sources (threshold 2 times the noise of a "
            "pixel in the image smoothed by 2 pixels, at least 5 pixels, deblended at a contrast "
            f"of 0.02). The {n} brightest that do not touch the edge were fitted, except two "
            "bright stars that their diffraction spikes give away (their positions are written in "
            "the code; nothing else sorts stars from galaxies). Pixels of neighbouring sources "
            f"were masked in each stamp, and nothing else was. {clipped} of the galaxies have "
            "pixels that the JPEG clips at 255 in some colour (column n_clipped of "
            "comparison.ecsv); these were kept and make the centres look fainter than they are."
        ),
        "The noise": (
            f"The scatter of a sky pixel is {rms:.3f} display units. JPEG compression, the scaling "
            "of the image and faint undetected galaxies make neighbouring pixels alike: averages "
            f"over {NOISE_SCALE} x {NOISE_SCALE} pixels scatter {demo.noise_factor:.2f} times more "
            "than those of independent pixels would. The fits used the scatter times this factor "
            "as the uncertainty of a sky pixel, so that errors of sizes and fluxes are about right "
            "for galaxies of that size (too large for the smallest, too small for the largest), "
            f"and pure noise gives chi2/dof of about {demo.noise_factor**-2:.2f}, not 1. Brighter "
            "pixels have larger uncertainties: the errors of a JPEG are taken to be the same at "
            "every level of the encoded scale, and in linear light they grow with its slope "
            f"(up to {np.nanmax(demo.sigma):.0f} in the brightest pixels). That is an assumption: "
            "photon noise cannot be known from such an image. Where chi2/dof is well above 1, the "
            "galaxy has structure (arms, bars, neighbours) that no smooth model has, and the "
            "errors, which assume that the model is right, are too small."
        ),
        "The PSF": demo.psf.statement
        + (
            " The stretch changes the PSF with brightness and the three colours have different "
            "ones; the result is a typical one for faint, blue sources."
        ),
        "Gaussian or Sersic": (
            f"The Sersic model has one parameter more (a Gaussian is a Sersic of n = 0.5). "
            f"delta_chi2 = chi2(Gaussian) - chi2(Sersic) is above {SIGNIFICANT:.0f} (3 sigma, were "
            f"the models right) for {better} of {n} galaxies. {failed} of {n} could not be fitted. "
            f"{_at_bound(demo)} Sersic fits ended at a bound (flag AT_BOUND), most of them at the "
            "lowest n that the model has: the stretch flattens bright centres more than any "
            "galaxy does."
        ),
        "The learned galaxy": (
            "A Sersic profile times what it misses, drawn by a network that was trained on "
            "galaxies of the SDSS, simulated galaxies and a few of the KiDS survey, none of them "
            "in this image. It has "
            f"{demo.learned.params.shape[1]} parameters; the shape is in "
            f"{len(demo.learned.param_names) - 5} latents with a prior, so that a small faint "
            "galaxy stays a Sersic profile and a large bright one gets its arms and bars. "
            "delta_chi2_learned = chi2(Sersic) - chi2(learned) is above "
            f"{SIGNIFICANT:.0f} for {_verdict(demo, 'delta_chi2_learned')[1]} of {n} galaxies; "
            "the median is "
            f"{_verdict(demo, 'delta_chi2_learned')[2]:.0f}. More parameters fit better always: "
            "how well the model predicts pixels that it has not seen is measured in the "
            "documentation."
        ),
        "Conventions": (
            "Pixel (0, 0) is centred on (x, y) = (0, 0). r_eff is the semi-major axis of the "
            "ellipse that holds half of the light, in pixels, before the PSF; ellip = 1 - b/a; "
            "theta is counter-clockwise from +x, in degrees; flux is integrated to infinity, in "
            "display units; NAME_err is one standard deviation. The bits of flags are explained "
            "by galmorph.FitFlag."
        ),
    }
    text = ["galmorph demo: galaxies of the Hubble eXtreme Deep Field", ""]
    text += ["Files", "-----", *files, ""]
    for title, body in sections.items():
        text += [title, "-" * len(title), textwrap.fill(body, 88), ""]
    return "\n".join(text)


def _verdict(demo: Demo, column: str = "delta_chi2") -> tuple[int, int, float]:
    """Number of galaxies, of those that the Sersic fits better, and the median gain."""
    gain = np.asarray(demo.table[column], dtype=float)
    return len(gain), int(np.sum(gain > SIGNIFICANT)), float(np.nanmedian(gain))


def summary(demo: Demo, n_rows: int = 15) -> str:
    """The table and the verdict, as printed at the end."""
    from galmorph.flags import decode_flags

    head = (
        f"{'':>5}{'x':>7}{'y':>7}{'flux / 1000':>15}{'r_eff [px]':>16}{'n':>18}{'ellip':>17}"
        f"{'chi2/dof':>23}{'gains':>13}\n"
        f"{'':>5}{'':>14}{'':>66}{'Gauss':>8}{'Sersic':>7}{'learned':>8}{'Sersic':>8}{'learned':>8}"
    )
    lines = [head]
    for i in range(min(n_rows, len(demo.table))):
        row = demo.table[i]
        flags = ", ".join(f for f in decode_flags(int(row["flags"])) if f != "POOR_FIT")
        lines.append(
            f"{row['label']:>5}{_plain(row['x_0']):7.1f}{_plain(row['y_0']):7.1f}"
            f"{_pm(row['flux'], row['flux_err'], 1e-3):>15}"
            f"{_pm(row['r_eff'], row['r_eff_err']):>16}{_pm(row['n'], row['n_err']):>18}"
            f"{_pm(row['ellip'], row['ellip_err']):>17}"
            f"{row['chi2_dof_gaussian']:8.2f}{row['chi2_dof_sersic']:7.2f}"
            f"{row['chi2_dof_learned']:8.2f}{row['delta_chi2']:8.0f}"
            f"{row['delta_chi2_learned']:8.0f}  {flags}".rstrip()
        )
    n, better, median = _verdict(demo)
    _, learned_better, learned_median = _verdict(demo, "delta_chi2_learned")
    rest = n - min(n_rows, n)
    if rest:
        lines.append(f"  ... and {rest} more in {demo.output / 'comparison.ecsv'}")
    words = [
        f"Sersic beats Gaussian (gain = chi2(Gaussian) - chi2(Sersic) > {SIGNIFICANT:.0f}) for "
        f"{better} of {n} galaxies; median gain {median:.0f}. The learned galaxy beats Sersic in "
        f"the same way for {learned_better}; median gain {learned_median:.0f}.",
        f"The picture was stretched for display, which flattens the centres of bright galaxies: "
        f"{_at_bound(demo)} fits want n below the lowest that the model has (AT_BOUND). Noise: "
        f"{np.nanmedian(demo.detection.rms):.3f} a pixel of sky, times {demo.noise_factor:.2f} "
        f"because pixels are correlated. PSF: FWHM {demo.psf.fwhm:.2f} pixels, {demo.psf.n_stars} "
        f"{demo.psf.method}" + (" (an upper limit)." if demo.psf.method != "stars" else "."),
    ]
    return "\n".join([*lines, "", *(textwrap.fill(line, 100) for line in words)])


def _at_bound(demo: Demo) -> int:
    from galmorph.flags import FitFlag

    return int(np.sum((demo.sersic.flags & FitFlag.AT_BOUND) != 0))


def _plain(value: Any) -> float:
    return float(getattr(value, "value", value))


def _pm(value: Any, error: Any, scale: float = 1.0, figures: int = 2) -> str:
    """Value ± error with one or two significant digits of the error."""
    value, error = _plain(value) * scale, _plain(error) * scale
    if not (np.isfinite(value) and np.isfinite(error)):
        return "-"
    digits = 2 if error <= 0 else int(np.clip(figures - 1 - np.floor(np.log10(error)), 0, 4))
    return f"{value:.{digits}f} ± {error:.{digits}f}"


# -- figures -------------------------------------------------------------------------------


def _draw(demo: Demo, colour: np.ndarray) -> None:
    import matplotlib.pyplot as plt

    from galmorph import plot

    every = {"Gaussian": demo.gaussian, "Sérsic": demo.sersic, "Learned": demo.learned}

    def save(figure, file: str, text: str, dpi: int = 150) -> None:
        # Agg draws without a screen, whatever backend the user has.
        from matplotlib.backends.backend_agg import FigureCanvasAgg

        # A constrained layout needs no trimming, which would draw everything twice.
        trim = None if figure.get_layout_engine() is not None else "tight"
        FigureCanvasAgg(figure).print_figure(
            demo.output / file, dpi=dpi, bbox_inches=trim, facecolor="white",
            pil_kwargs={"compress_level": 4},
        )  # fmt: skip
        plt.close(figure)
        demo.files[file] = text

    for old in demo.output.iterdir():  # an earlier run may have chosen other galaxies
        if re.fullmatch(r"(galaxy-\d+-(fits|profile|corner)|contact-sheet-\d+)\.png", old.name):
            old.unlink()
    gallery = choose_gallery(demo)
    save(
        draw_hero(demo, colour, gallery), "demo.png", "the field and four galaxies with their fits"
    )
    save(
        draw_map(demo, colour), "map.png",
        "the field, the outlines of all sources, and half-light ellipses of the Sersic fits",
    )  # fmt: skip
    names = [str(label) for label in demo.sersic.ids]
    rows = np.arange(len(demo.sersic))
    for page, start in enumerate(range(0, len(rows), _PER_PAGE), start=1):
        shown = rows[start : start + _PER_PAGE]
        save(
            plot.contact_sheet(every, list(shown), ncols=2),
            f"contact-sheet-{page}.png",
            f"data, and Gaussian, Sersic and learned fits with residuals of galaxies {start + 1} "
            f"to {start + len(shown)}, brightest first; residuals in units of the noise",
            dpi=110,
        )
    for i in gallery[:_N_SINGLE]:
        label = names[i]
        axes = plot.compare_fits(every, i)
        save(axes.flat[0].figure, f"galaxy-{label}-fits.png", f"galaxy {label}, all fits")
        axes = plot.radial_profile(every, i)
        save(
            axes.flat[0].figure, f"galaxy-{label}-profile.png",
            f"galaxy {label}, brightness against radius",
        )  # fmt: skip
    label = names[gallery[0]]
    save(
        plot.corner(demo.sersic, gallery[0]), f"galaxy-{label}-corner.png",
        f"galaxy {label}, covariance of the Sersic parameters",
    )  # fmt: skip


def choose_gallery(demo: Demo) -> list[int]:
    """Four well-fitted galaxies of different kinds, for the figures."""
    from galmorph.flags import FitFlag

    table, sersic = demo.table, demo.sersic
    ratio = np.asarray(table["chi2_dof_sersic"], dtype=float)
    n, ellip = (np.asarray(table[name], dtype=float) for name in ("n", "ellip"))
    size = np.array([_plain(r) for r in table["r_eff"]])
    good = ~(sersic.failed | demo.gaussian.failed) & np.isfinite(ratio) & (size > 3.5) & (n > 0.35)
    good &= (sersic.flags & (FitFlag.AT_BOUND | FitFlag.NOT_CONVERGED)) == 0
    kinds = [
        good & (n > 1.2) & (ellip < 0.3),
        good & (ellip > 0.5),
        good & (n < 1.0) & (ellip < 0.5),
        good & (ellip > 0.3),
        good,
        np.ones(len(table), dtype=bool),
    ]
    gain = np.nan_to_num(np.asarray(table["delta_chi2"], dtype=float))
    # the galaxy that the learned model fits best of all beyond the Sersic, spirals as a rule
    learned_gain = np.nan_to_num(np.asarray(table["delta_chi2_learned"], dtype=float))
    chosen: list[int] = [int(learned_gain.argmax())]
    for kind in kinds:
        rows = [i for i in np.flatnonzero(kind) if i not in chosen]
        # where the Sersic is far better, and what it leaves is small
        rows.sort(key=lambda i: -gain[i] / max(ratio[i], 0.5) ** 2 if ratio[i] > 0 else 0.0)
        chosen += [int(i) for i in rows[: 1 if len(chosen) < 4 else 0]]
    return chosen[:4]


def _ellipses(ax: Any, demo: Demo, *, scale: float, **style: Any) -> None:
    from matplotlib.patches import Ellipse

    sersic = demo.sersic
    column = {name: k for k, name in enumerate(sersic.param_names)}
    for params in sersic.params[~sersic.failed]:
        x, y, r, ellip, theta = (
            params[column[name]] for name in ("x_0", "y_0", "r_eff", "ellip", "theta")
        )
        ax.add_patch(
            Ellipse(
                (x, y),
                2 * scale * r,
                2 * scale * r * (1 - ellip),
                angle=np.degrees(theta),
                fill=False,
                **style,
            )
        )


def draw_map(demo: Demo, colour: np.ndarray) -> Any:
    """The field with the outlines of all sources and the ellipses of the fits."""
    import matplotlib.pyplot as plt

    figure, ax = plt.subplots(figsize=(11, 9.8), layout="constrained")
    ax.imshow(colour, origin="lower", interpolation="none")
    segments = demo.detection.segmentation.data
    ax.contour(segments > 0, levels=[0.5], colors="0.6", linewidths=0.25)
    _ellipses(ax, demo, scale=1.0, edgecolor="#ffd166", linewidth=0.9)
    for label, params in zip(demo.sersic.ids, demo.sersic.params, strict=True):
        if np.isfinite(params[1]):
            ax.annotate(
                str(label), params[1:3], xytext=(5, 5), textcoords="offset points",
                fontsize=5, color="white",
            )  # fmt: skip
    ax.set(
        xlabel="x [pixel]", ylabel="y [pixel]",
        title=f"Hubble eXtreme Deep Field: {len(demo.detection)} sources (grey outlines), "
        f"{len(demo.sersic)} fitted (yellow: half-light ellipses)",
    )  # fmt: skip
    return figure


def draw_hero(demo: Demo, colour: np.ndarray, gallery: list[int]) -> Any:
    """The field beside four galaxies: data, models, residuals."""
    import matplotlib.pyplot as plt

    rows = len(gallery)
    figure = plt.figure(figsize=(17.0, 6.3), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(0.42, 0.58), wspace=0.01)
    ax = left.subplots()
    ax.imshow(colour, origin="lower", interpolation="none")
    _ellipses(ax, demo, scale=2.0, edgecolor="#ffd166", linewidth=0.8)
    ax.set_axis_off()
    ax.set_title(
        f"Hubble eXtreme Deep Field, {len(demo.sersic)} galaxies fitted", fontsize=12, pad=8
    )

    grid = right.subplots(rows, 8, squeeze=False)
    for k, i in enumerate(gallery):
        letter = "abcdef"[k]
        drawn = _draw_row(grid[k], demo, colour, i)
        grid[k, 0].set_ylabel(letter, rotation=0, fontsize=13, fontweight="bold", labelpad=10)
        ax.annotate(
            letter, demo.sersic.params[i, 1:3], xytext=(9, 9), textcoords="offset points",
            color="white", fontsize=12, fontweight="bold",
        )  # fmt: skip
    heads = ["Image", "Data"]
    for name in ("Gaussian", "Sérsic", "Learned"):
        heads += [name, "Residual"]
    for panel, head in zip(grid[0], heads, strict=True):
        panel.set_title(head, fontsize=12, pad=8)
    bar = right.colorbar(drawn, ax=grid[:, 7], shrink=0.6, aspect=30, pad=0.02, extend="both")
    bar.set_label("Residual [σ]")
    return figure


def _draw_row(panels: Any, demo: Demo, colour: np.ndarray, i: int) -> Any:
    """Image, data, models and residuals of one galaxy, cropped to where its light is."""
    from galmorph.plot import drawing

    views = [drawing.StampView(result, i) for result in (demo.gaussian, demo.sersic, demo.learned)]
    norm = drawing.brightness_norm(views)
    x_0, y_0 = demo.sersic.origin[i]
    ny, nx = views[0].shape
    panels[0].imshow(
        _cut(colour, x_0, y_0, nx, ny), origin="lower", interpolation="none",
        extent=views[0].extent,
    )  # fmt: skip
    drawing.draw_brightness(panels[1], views[0].data, views[0], norm)
    bar = None
    for view, model_ax, residual_ax in zip(views, panels[2::2], panels[3::2], strict=True):
        if view.model is None:
            drawing.empty_panel(model_ax, view, "no fit")
            drawing.empty_panel(residual_ax, view, "no fit")
            continue
        drawing.draw_brightness(model_ax, view.model, view, norm)
        bar = drawing.draw_residual(residual_ax, view.residual, view, 5.0)
        ratio = view.result.chi2[i] / view.result.dof[i]
        residual_ax.set_xlabel(rf"$\chi^2$/dof = {ratio:.2f}", fontsize=9)
    column = list(demo.sersic.param_names).index("n")
    n, error = demo.sersic.params[i, column], demo.sersic.stds[i, column]
    panels[4].set_xlabel(f"n = {_pm(n, error, figures=1)}", fontsize=9)
    center, reach = _crop(demo, i)
    for panel in panels:
        panel.set(xticks=[], yticks=[])
        panel.set_xlim(center[0] - reach, center[0] + reach)
        panel.set_ylim(center[1] - reach, center[1] + reach)
    return bar


def _crop(demo: Demo, i: int) -> tuple[np.ndarray, float]:
    """Centre and half side of what is shown of a galaxy: a third more than its segment."""
    row = int(np.flatnonzero(demo.detection.catalog.labels == demo.sersic.ids[i])[0])
    box = demo.detection.catalog.bbox[row]
    center = np.array([(box.ixmin + box.ixmax - 1) / 2, (box.iymin + box.iymax - 1) / 2])
    return center, 0.67 * max(box.shape)


def _cut(colour: np.ndarray, x: int, y: int, nx: int, ny: int) -> np.ndarray:
    """Part of the colour image; black beyond its edges."""
    stamp = np.zeros((ny, nx, 3), dtype=colour.dtype)
    bottom, left = max(y, 0), max(x, 0)
    part = colour[bottom : max(y + ny, 0), left : max(x + nx, 0)]
    stamp[bottom - y :, left - x :][: part.shape[0], : part.shape[1]] = part
    return stamp
