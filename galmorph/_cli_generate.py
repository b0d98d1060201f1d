"""``galmorph generate``: synthetic galaxies, as stamps or as a field."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

__all__ = ["add_parser", "run"]

MODELS = {
    "learned": "LearnedGalaxy2D",
    "sersic": "SersicGalaxy2D",
    "bulge-disk": "BulgeDiskGalaxy2D",
}

_EPILOG = """\
examples:
  A field of 2000 x 2000 pixels with as many galaxies as the sky has:
    galmorph generate --field 2000 --psf psf.fits --rms 0.02 -o mock.fits

  The same, brighter galaxies only, with the noise of sky and light (photoelectrons):
    galmorph generate --field 2000 --magnitudes 17 21 --psf fwhm=3.5 --gain 4 --sky 30 -o mock.fits

  A hundred stamps of 64 x 64 pixels, without noise:
    galmorph generate --n 100 --psf fwhm=3.5 -o stamps.fits

  Light before any telescope, of one flux and size:
    galmorph generate --n 100 --canonical -o light.fits

what comes out:
  FITS extensions SCI (data), ERR (noise), LIGHT (without noise), PSF, TRUTH (a catalogue with
  the parameters of every galaxy) and, of a field, SEG (the id of the galaxy that
  dominates each pixel). "galmorph fit" takes the file as it is. The same --seed gives the same
  galaxies.
"""


def add_parser(subparsers) -> None:
    """Add the subcommand.

    Parameters
    ----------
    subparsers : argparse action
        Of ``ArgumentParser.add_subparsers``.
    """
    parser = subparsers.add_parser(
        "generate",
        help="make synthetic galaxies: stamps, or a mock field with its truth",
        description="Make synthetic galaxies, as stamps or as a field, with their truth.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = parser.add_argument_group("what")
    what.add_argument("--n", type=int, metavar="N", help="number of stamps, or of galaxies")
    what.add_argument(
        "--field", type=int, nargs="+", metavar="SIZE", help="a field of SIZE (or NX NY) pixels"
    )
    what.add_argument(
        "--size", type=int, default=64, metavar="N", help="side of the stamps (default: 64)"
    )
    what.add_argument(
        "--canonical", action="store_true", help="stamps before the telescope: one flux and size"
    )
    what.add_argument("--model", choices=tuple(MODELS), default="learned", help="default: learned")
    what.add_argument(
        "--weights", default="default", metavar="NAME|FILE", help="of the learned model"
    )
    what.add_argument(
        "--population", default="default", metavar="NAME|FILE|none",
        help="what shapes there are (none: the prior of the network)",
    )  # fmt: skip

    sky = parser.add_argument_group("galaxies")
    sky.add_argument(
        "--magnitudes", type=float, nargs=2, default=(18.0, 24.0), metavar=("BRIGHT", "FAINT"),
        help="default: 18 24",
    )  # fmt: skip
    sky.add_argument(
        "--texture", type=float, default=0.0, metavar="X",
        help="structure that the learned model misses, in units of its misfit (0.5: as real ones)",
    )  # fmt: skip
    sky.add_argument(
        "--slope", type=float, metavar="S", help="of log10 counts with magnitude (default: 0.3)"
    )
    sky.add_argument(
        "--density", type=float, metavar="D",
        help="galaxies per square arcminute (default: counts of KiDS in r)",
    )  # fmt: skip

    seen = parser.add_argument_group("telescope")
    seen.add_argument("--psf", metavar="FILE|fwhm=F", help="PSF image, or a Gaussian of F pixels")
    seen.add_argument(
        "--psf-oversampling", type=int, metavar="N", help="samples of the PSF file per pixel"
    )
    seen.add_argument(
        "--psf-without-pixel", action="store_true", help="the PSF file is optical only"
    )
    seen.add_argument(
        "--pixel-scale", type=float, default=0.2, metavar="ARCSEC", help="default: 0.2"
    )
    seen.add_argument(
        "--zero-point", type=float, default=25.0, metavar="MAG",
        help="magnitude of one unit of flux (default: 25)",
    )  # fmt: skip
    seen.add_argument(
        "--rms", type=float, default=0.0, metavar="X", help="Gaussian noise of a pixel"
    )
    seen.add_argument(
        "--gain", type=float, metavar="G", help="photoelectrons per unit of flux: Poisson noise"
    )
    seen.add_argument(
        "--sky", type=float, default=0.0, metavar="X", help="level of the sky (with --gain)"
    )
    seen.add_argument(
        "--center", type=float, nargs=2, default=(150.0, 2.0), metavar=("RA", "DEC"),
        help="middle of the field, degrees (default: 150 2)",
    )  # fmt: skip

    out = parser.add_argument_group("output")
    out.add_argument("-o", "--output", required=True, metavar="FILE", help="a FITS file")
    out.add_argument("--seed", type=int, default=0, help="default: 0")
    out.add_argument("--overwrite", action="store_true", help="replace a file that exists")
    out.add_argument("-q", "--quiet", action="store_true", help="no summary")
    out.add_argument("--debug", action="store_true", help="show where an error came from")


def run(args: argparse.Namespace) -> int:
    """Run the subcommand.

    Parameters
    ----------
    args : Namespace

    Returns
    -------
    int
        0.

    Raises
    ------
    ValueError, OSError
        If something has to be changed by the user.
    """
    import numpy as np

    from galmorph.synthetic import draw_galaxies, mock_field

    output = _checked(args)
    rng = np.random.default_rng(args.seed)
    model = _model(args)
    shape = (args.size, args.size) if args.field is None else tuple(args.field[::-1] * 2)[:2]
    counts = {} if args.slope is None else {"slope": args.slope}
    params = draw_galaxies(
        model,
        args.n,
        shape=shape,
        pixel_scale=args.pixel_scale,
        zero_point=args.zero_point,
        magnitudes=_magnitudes(args),
        density=args.density,
        population=_population(args.population),
        rng=rng,
        **counts,
    )
    if args.field is None:
        _stamps(args, model, params, rng).writeto(output, overwrite=args.overwrite)
        what = f"{len(params)} stamps of {args.size} x {args.size} pixels"
    else:
        field = mock_field(
            model,
            params,
            shape,
            rms=args.rms,
            gain=args.gain,
            sky=args.sky,
            pixel_scale=args.pixel_scale,
            zero_point=args.zero_point,
            center=tuple(args.center),
            texture=args.texture,
            rng=rng,
        )
        field.meta |= {"seed": args.seed, "popul": args.population}
        field.write(output, overwrite=args.overwrite)
        what = f"{len(params)} galaxies on {shape[1]} x {shape[0]} pixels"
    if not args.quiet:
        sys.stdout.write(f"{what}\nwritten: {output}\n")
    return 0


def _checked(args: argparse.Namespace) -> Path:
    """The output, after a look at everything that would fail late."""
    output = Path(args.output)
    if not output.name.lower().endswith((".fits", ".fits.gz")):
        raise ValueError(f"-o {output}: the name must end in .fits")
    if output.exists() and not args.overwrite:
        raise ValueError(f"{output} exists; choose another name, or say --overwrite")
    if not output.parent.is_dir():
        raise ValueError(f"{output.parent}: no such folder")
    if args.n is None and args.field is None:
        raise ValueError("say how many stamps (--n N) or how large a field (--field SIZE)")
    if args.n is not None and args.n < 1:
        raise ValueError(f"--n must be positive, not {args.n}")
    if args.field is not None and (len(args.field) > 2 or min(args.field) < 1):
        raise ValueError("--field takes one side, or NX NY, in pixels")
    if args.canonical and args.field is not None:
        raise ValueError("--canonical is for stamps; leave --field out")
    if (args.psf_oversampling or args.psf_without_pixel) and not _is_file(args.psf):
        raise ValueError("--psf-oversampling and --psf-without-pixel describe a PSF file (--psf)")
    return output


def _is_file(psf: str | None) -> bool:
    return psf is not None and not psf.startswith("fwhm=")


def _magnitudes(args: argparse.Namespace) -> tuple[float, float]:
    bright, faint = args.magnitudes
    if not bright < faint:
        raise ValueError(f"--magnitudes: BRIGHT must be less than FAINT, not {bright:g} {faint:g}")
    return bright, faint


def _model(args: argparse.Namespace) -> Any:
    import galmorph

    psf = _psf(args)
    if args.model != "learned":
        return getattr(galmorph, MODELS[args.model])(psf=psf)
    if os.path.isfile(args.weights):
        return galmorph.LearnedGalaxy2D.read(args.weights, psf=psf)
    return galmorph.LearnedGalaxy2D.from_pretrained(args.weights, psf=psf)


def _psf(args: argparse.Namespace) -> Any:
    from galmorph.psf import PSF

    if args.psf is None:
        return None
    if not _is_file(args.psf):
        from galmorph.detection import gaussian_psf

        try:
            return gaussian_psf(float(args.psf.removeprefix("fwhm=")))
        except ValueError:
            raise ValueError(f"--psf {args.psf}: the FWHM must be a positive number") from None
    psf = PSF.from_any(args.psf)
    if not args.psf_oversampling and not args.psf_without_pixel:
        return psf  # its header may say how it was sampled
    return PSF(
        psf.data,
        oversampling=args.psf_oversampling or psf.oversampling,
        includes_pixel=not args.psf_without_pixel,
    )


def _population(name: str) -> Any:
    if name == "none":
        return None
    if os.path.isfile(name):
        from galmorph.nets.flow import Population

        return Population.read(name)
    return name


def _stamps(args: argparse.Namespace, model: Any, params: Any, rng: Any) -> Any:
    """Extensions SCI, ERR, LIGHT, PSF and TRUTH of a cube of stamps."""
    import numpy as np
    from astropy.io import fits

    from galmorph.synthetic import canonical_images, mock_stamps, psf_hdu, table_hdu, truth_table

    primary = fits.PrimaryHDU()
    primary.header["SEED"] = args.seed
    primary.header["MODEL"] = type(model).__name__
    if args.canonical:
        images = {"SCI": canonical_images(model, params, size=args.size, r_50=args.size / 8)}
    else:
        shape = (args.size, args.size)
        params[:, 1:3] = (args.size - 1) / 2 + rng.uniform(-0.5, 0.5, (len(params), 2))
        seed = int(rng.integers(2**62))  # the same texture, with and without noise
        light = mock_stamps(model, params, shape, texture=args.texture, rng=seed).data
        mock = mock_stamps(
            model,
            params,
            shape,
            rms=args.rms,
            gain=args.gain,
            sky=args.sky,
            texture=args.texture,
            rng=seed,
        )
        images = {"SCI": mock.data, "LIGHT": light}
        if mock.uncertainty.any():
            images["ERR"] = mock.uncertainty
    hdus = [primary, *(fits.ImageHDU(d.astype(np.float32), name=n) for n, d in images.items())]
    if model.psf is not None and not args.canonical:
        hdus.append(psf_hdu(model.psf))
    table = truth_table(model, params, pixel_scale=args.pixel_scale, zero_point=args.zero_point)
    return fits.HDUList([*hdus, table_hdu(table)])
