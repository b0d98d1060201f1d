"""``galmorph catalog``: everything in an image of a field, measured."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

__all__ = ["add_parser", "run"]

_EPILOG = """\
examples:
  A file with image, noise, PSF and WCS in the usual extensions:
    galmorph catalog field.fits -o catalog.fits

  Image, weight map and PSF in files of their own; zero point of the magnitudes:
    galmorph catalog coadd.fits --uncertainty weight.fits --uncertainty-type ivar \\
        --psf psf.fits --zero-point 27 -o catalog.fits

  Only Sersic profiles and stars (quicker), PSF from the stars of the image:
    galmorph catalog coadd.fits --model sersic --psf auto -o catalog.fits

  One band of several in a file, and the fluxes of the same models in two others:
    galmorph catalog 'field.fits[SCI_R]' --band g='field.fits[SCI_G]' \\
        --band i='field.fits[SCI_I]' -o catalog.fits

what comes out:
  catalog.fits         one row a source: position, flux and magnitude with errors, size, shape,
                       Sersic index or latents, probabilities of star and of each class,
                       flags; columns have units and descriptions
  catalog_images.fits  model, residual, segmentation, background and noise, with the WCS
  catalog.html         field, thumbnails and table, to page through in a browser

An image without any source gives a catalogue without rows, and exit code 0.

PSF and noise of an extension SCI_<band> are looked for in PSF_<band>, ERR_<band>, VAR_<band>,
IVAR_<band> or WHT_<band>, or the noise in its header (NOISERMS).

resuming:
  Finished fits are kept beside the output (OUTPUT.checkpoint) until the job is done. After
  an interruption, give the same command again.
"""


def add_parser(subparsers) -> None:
    """Add the subcommand.

    Parameters
    ----------
    subparsers : argparse action
        Of ``ArgumentParser.add_subparsers``.
    """
    from galmorph import cli

    parser = subparsers.add_parser(
        "catalog",
        help="catalogue of an image: detection, deblending, photometry",
        description="Find, deblend and measure everything in an image of a field.",
        epilog=_EPILOG,
        formatter_class=cli._Formatter,
    )
    cli._add_image_arguments(parser, "FITS file (or .npy array) with one image (ny, nx)")
    group = parser.add_argument_group("calibration")
    group.add_argument(
        "--gain", type=cli._positive_float, metavar="G",
        help="electrons per unit of the data: adds the photon noise of the sources",
    )  # fmt: skip
    group.add_argument(
        "--zero-point", type=float, metavar="MAG",
        help="AB magnitude of one unit of flux (default: from BUNIT, if it is a flux density)",
    )  # fmt: skip
    group.add_argument(
        "--pixel-scale", type=cli._positive_float, metavar="ARCSEC",
        help="of an image without a WCS",
    )  # fmt: skip
    group.add_argument(
        "--noise-factor", type=cli._positive_float, metavar="F",
        help="of the uncertainty, for correlated noise (default: measured; 1: none)",
    )  # fmt: skip

    group = parser.add_argument_group("sources")
    group.add_argument(
        "--positions", metavar="TABLE",
        help="sources, instead of a detection: columns x,y (pixels from 0) or ra,dec (deg)",
    )  # fmt: skip
    group.add_argument(
        "--threshold", type=cli._positive_float, metavar="S",
        help="of the detection, in units of the noise of a pixel (default: 1.5)",
    )  # fmt: skip
    group.add_argument(
        "--n-pixels", type=cli._positive_int, metavar="N",
        help="fewest connected pixels of a source (default: 5)",
    )  # fmt: skip
    group.add_argument(
        "--contrast", type=float, metavar="C",
        help="least share of a blend's light that makes a peak a source (default: 0.005)",
    )  # fmt: skip
    group.add_argument(
        "--kernel-fwhm", type=cli._positive_float, metavar="F",
        help="of the filter that sources are found with, pixels (default: 2)",
    )  # fmt: skip
    group.add_argument(
        "--box-size", type=cli._positive_int, metavar="N",
        help="mesh of the background map, pixels (default: 64)",
    )  # fmt: skip
    group.add_argument(
        "--background", choices=("map", "constant", "none"), help="to subtract (default: map)"
    )
    group.add_argument(
        "--find-missed", type=float, default=6.0, metavar="S",
        help="significance of sources that are looked for in the residual; 0: none (default: 6)",
    )  # fmt: skip

    group = parser.add_argument_group("models")
    group.add_argument(
        "--model", choices=("auto", "sersic", "learned", "bulge-disk"), default="auto",
        help="of galaxies; auto: Sersic or learned, whichever has the greater evidence (default)",
    )  # fmt: skip
    group.add_argument(
        "--star-prior", type=float, default=0.2, metavar="P",
        help="share of stars that is expected (default: 0.2)",
    )  # fmt: skip
    group.add_argument(
        "--structure", type=cli._nonnegative_float, default=1.0, metavar="S",
        help="light that models lack, as arms and clumps, that errors allow for; 1: as in real "
        "galaxies; 0: none (default: 1)",
    )  # fmt: skip
    group.add_argument(
        "--max-group", type=cli._positive_int, default=8, metavar="N",
        help="most sources that are fitted together (default: 8)",
    )  # fmt: skip
    group.add_argument("--no-classes", action="store_true", help="no morphological classes")
    group.add_argument(
        "--band", action="append", default=[], metavar="NAME=FILE", type=_band,
        help="another image, for fluxes of the same models; may be repeated",
    )  # fmt: skip

    group = parser.add_argument_group("output")
    group.add_argument(
        "-o", "--output", required=True, metavar="FILE", help="catalogue, .fits or .ecsv"
    )
    group.add_argument("--overwrite", action="store_true", help="replace files that exist")
    group.add_argument("--no-images", action="store_true", help="no images of model and residual")
    group.add_argument("--no-report", action="store_true", help="no HTML report")
    group.add_argument(
        "--checkpoint", metavar="FILE", help="finished fits (default: OUTPUT.checkpoint)"
    )
    group.add_argument(
        "--workers", type=cli._positive_int, default=1, metavar="N",
        help="processes that fit (default: 1)",
    )  # fmt: skip
    group.add_argument("--restart", action="store_true", help="ignore and delete an old checkpoint")
    cli._add_common(parser)


def _band(text: str) -> tuple[str, str]:
    name, _, file = text.partition("=")
    if not name or not file:
        raise argparse.ArgumentTypeError(f"must be NAME=FILE, not {text!r}")
    return name, file


def run(args: argparse.Namespace) -> int:
    """Run the subcommand.

    Parameters
    ----------
    args : argparse.Namespace

    Returns
    -------
    int
        Exit code.
    """
    import numpy as np

    from galmorph import cli
    from galmorph.catalog import photometry

    files = _check_output(args)
    checkpoint = Path(args.checkpoint or f"{files[0]}.checkpoint")
    if args.restart:
        checkpoint.unlink(missing_ok=True)
    elif checkpoint.exists() and not args.quiet:
        cli._say(f"going on with what {checkpoint} holds")
    options = {
        name: getattr(args, name)
        for name in ("threshold", "n_pixels", "contrast", "kernel_fwhm", "box_size", "background")
        if getattr(args, name) is not None
    }
    image = cli._pixels(cli._image_name(args))
    with cli._progress(args.quiet, "fitted") as report:
        found = photometry(
            image,
            None if args.positions is None else cli._read_table(args.positions),
            model=args.model,
            uncertainty=cli._uncertainty(args),
            mask=None if args.mask is None else cli._mask(args.mask),
            psf="auto" if args.psf == "auto" else cli._psf(args, {"images": image}, None),
            gain=args.gain,
            zero_point=args.zero_point,
            pixel_scale=args.pixel_scale,
            noise_factor=args.noise_factor,
            detection=options,
            star_prior=args.star_prior,
            structure=args.structure,
            find_missed=args.find_missed or None,
            classes=not args.no_classes,
            bands=dict(args.band),
            max_group=args.max_group,
            checkpoint=checkpoint,
            workers=args.workers,
            progress=report,
        )
    found.meta["command"] = "galmorph catalog"
    if not args.quiet and found.psf_statement not in ("given", ""):
        cli._say(f"PSF: {found.psf_statement}")
    found.write(
        files[0], images=not args.no_images, report=not args.no_report, overwrite=args.overwrite
    )
    checkpoint.unlink(missing_ok=True)
    if not args.quiet:
        print(_summary(found, files))
    lost = len(found) > 0 and np.all(found.scene.failed)
    return cli.NOTHING_FITTED if lost else cli.OK


def _check_output(args: argparse.Namespace) -> list[Path]:
    """Everything that would fail after the fits is looked at before them."""
    from galmorph import cli
    from galmorph.catalog import output_files

    try:
        files = output_files(args.output, images=not args.no_images, report=not args.no_report)
    except ValueError as error:
        raise cli.UsageError(f"-o {error}") from None
    cli._check_writable(files, args.overwrite)
    cli._check_psf(args)
    names = [name for name, _ in args.band]
    if len(set(names)) != len(names):
        raise cli.UsageError("two --band have the same name")
    return files


def _summary(found: Any, files: list[Path]) -> str:
    import numpy as np

    from galmorph.models.point_source import PointSource2D

    scene = found.scene
    stars = sum(isinstance(model, PointSource2D) for model in scene.models)
    failed, added = int(np.sum(scene.failed)), int(np.sum(scene.added))
    kinds: dict[str, int] = {}
    for model in scene.models:
        kinds[type(model).__name__] = kinds.get(type(model).__name__, 0) + 1
    lines = [
        f"{len(scene)} sources ({added} of them from the residual): {stars} stars, "
        f"{len(scene) - stars - failed} galaxies, {failed} not fitted.",
        "models: " + ", ".join(f"{name} {count}" for name, count in sorted(kinds.items())),
        "written: " + ", ".join(str(file) for file in files),
    ]
    return "\n".join(lines)
