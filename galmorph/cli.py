"""The command line: ``galmorph demo``, ``galmorph fit`` and ``galmorph train``.

Nothing heavy is imported before a subcommand runs, so that ``--help`` is quick.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from galmorph import _cli_calibrate, _cli_catalog, _cli_generate, _cli_train, _cli_weights

__all__ = ["main"]

#: Exit codes; they are explained in ``--help``.
OK, NOTHING_FITTED, BAD_INPUT, INTERNAL, INTERRUPTED = 0, 1, 2, 3, 130

MODELS = {
    "sersic": "SersicGalaxy2D",
    "gaussian": "GaussianGalaxy2D",
    "bulge-disk": "BulgeDiskGalaxy2D",
    "point": "PointSource2D",
}

_EXIT_CODES = """\
exit codes:
  0    done (single galaxies may be flagged; see the column "flags")
  1    done, but not one galaxy could be fitted; the catalogue says why
  2    wrong usage or input: a missing or damaged file, shapes that differ, ...
  3    internal error: please report it, with the output of --debug
  130  interrupted; the same command goes on where it was stopped
"""

_MAIN_EPILOG = (
    """\
start with:
  galmorph demo               see it work on the Hubble eXtreme Deep Field
  galmorph fit --help         fit your own images
  galmorph catalog --help     catalogue of a field
  galmorph train --help       train a network on your own stamps

"""
    + _EXIT_CODES
)

_FIT_EPILOG = (
    """\
examples:
  One galaxy on a small image, the noise estimated from its outskirts:
    galmorph fit stamp.fits --psf psf.fits -o galaxy.ecsv

  A cube of stamps (N, ny, nx) with a cube of standard deviations:
    galmorph fit cube.fits --uncertainty sigma.fits --psf psf.fits -o catalog.fits

  A survey image with its weight map, at the positions of a catalogue
  (columns x,y in pixels counted from 0, or ra,dec in degrees):
    galmorph fit field.fits --uncertainty weight.fits --uncertainty-type ivar \\
        --psf psf.fits --positions galaxies.csv --size 65 -o catalog.fits

  Detect the sources first, measure the PSF from the stars, and draw the fits:
    galmorph fit field.fits --detect --psf auto --plots figures -o catalog.fits

  Second extension of a JWST file; uncertainty and mask are found in the file:
    galmorph fit 'i2d.fits[SCI]' --detect --psf fwhm=2.1 -o catalog.ecsv

  Exponential disks only (n fixed):
    galmorph fit cube.fits --model sersic --fix n=1 -o disks.ecsv

what comes out:
  One row a galaxy: parameters and their standard deviations (flux, flux_err,
  x_0, x_0_err, ...), background, chi2, dof and flags. Positions are in pixels,
  (0, 0) the centre of the first one; radii are semi-major axes in pixels;
  theta is in degrees, counter-clockwise from +x. If the image has a WCS there
  are sky coordinates, position angles and radii in arcsec as well. Read it with
    astropy.table.QTable.read("catalog.fits")  or  galmorph.FitResult.read(...)

resuming:
  Finished batches are kept in a file beside the output (OUTPUT.checkpoint)
  until the job is done. After an interruption, give the same command again.

"""
    + _EXIT_CODES
)

_DEMO_EPILOG = """\
Needs scikit-image (pip install "galmorph[demo]"), whose package holds the image; nothing
is downloaded. README.txt in the output folder explains every file, and how noise and PSF
were estimated.
"""


class UsageError(Exception):
    """Something that the user has to change; its text is shown as it is."""


# -- arguments ---------------------------------------------------------------------------


class _Formatter(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=30, width=88)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="galmorph",
        description="Fit galaxy models to images, with uncertainties.",
        epilog=_MAIN_EPILOG,
        formatter_class=_Formatter,
    )
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    _add_demo(commands)
    _add_fit(commands)
    _cli_catalog.add_parser(commands)
    _cli_train.add_parser(commands)
    _cli_weights.add_parser(commands)
    _cli_calibrate.add_parser(commands)
    _cli_generate.add_parser(commands)
    return parser


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-q", "--quiet", action="store_true", help="no progress, no summary")
    parser.add_argument(
        "--debug", action="store_true", help="show where an error came from (traceback)"
    )


def _add_image_arguments(parser: argparse.ArgumentParser, text: str) -> None:
    """The image, its noise, mask and PSF."""
    group = parser.add_argument_group("input")
    group.add_argument("image", metavar="IMAGE", help=text)
    group.add_argument(
        "--ext", metavar="EXT",
        help="extension of IMAGE, as 1 or SCI or SCI,2 (default: SCI or the first image)",
    )  # fmt: skip
    group.add_argument(
        "--uncertainty", metavar="FILE|VALUE",
        help="of the pixels; a file of IMAGE's shape, or a number (default: the extension ERR, "
        "VAR or IVAR of IMAGE, or an estimate from each stamp)",
    )  # fmt: skip
    group.add_argument(
        "--uncertainty-type", choices=("std", "var", "ivar"), default="std",
        help="standard deviation, variance or inverse variance (default: std)",
    )  # fmt: skip
    group.add_argument("--mask", metavar="FILE", help="pixels that are not 0 or false are bad")
    group.add_argument(
        "--psf", metavar="FILE|fwhm=F|auto",
        help="PSF image (a cube: one a stamp); a Gaussian of F pixels; or measured from the "
        "point sources of IMAGE. By default an extension PSF of IMAGE, or none",
    )  # fmt: skip
    group.add_argument(
        "--psf-oversampling", type=_positive_int, metavar="N",
        help="samples of the PSF file per pixel along each axis (default: 1)",
    )  # fmt: skip
    group.add_argument(
        "--psf-without-pixel", action="store_true",
        help="the PSF file is optical only: the pixel's response is not in it",
    )  # fmt: skip


def _add_demo(commands) -> None:
    parser = commands.add_parser(
        "demo",
        help="detect and fit galaxies of the Hubble eXtreme Deep Field",
        description=(
            "Detect galaxies in the Hubble eXtreme Deep Field, fit a Gaussian and a Sersic "
            "model\nto the brightest, and write catalogues and figures to a folder."
        ),
        epilog=_DEMO_EPILOG,
        formatter_class=_Formatter,
    )
    parser.add_argument(
        "-o", "--output", default="galmorph-demo", metavar="DIR", help="default: galmorph-demo"
    )
    parser.add_argument(
        "-n", "--number", type=_positive_int, default=80, metavar="N",
        help="number of galaxies to fit, brightest first (default: 80)",
    )  # fmt: skip
    _add_common(parser)


def _add_fit(commands) -> None:
    parser = commands.add_parser(
        "fit",
        help="fit the galaxies of an image or of a cube of stamps",
        description="Fit every galaxy of an image, or of a cube of stamps, and write a catalogue.",
        epilog=_FIT_EPILOG,
        formatter_class=_Formatter,
    )
    _add_image_arguments(
        parser,
        "FITS file (or .npy array): one stamp (ny, nx), a cube of stamps (N, ny, nx), or, "
        "with --positions or --detect, a large image",
    )
    group = parser.add_argument_group("galaxies")
    where = group.add_mutually_exclusive_group()
    where.add_argument(
        "--positions", metavar="TABLE",
        help="ECSV, CSV, FITS or other table with columns x,y (pixels from 0) or ra,dec (deg)",
    )  # fmt: skip
    where.add_argument(
        "--detect", action="store_true", help="find the galaxies; mask each one's neighbours"
    )
    group.add_argument(
        "--threshold", type=_positive_float, metavar="S",
        help="of --detect, in units of the noise of a pixel (default: 1.5)",
    )  # fmt: skip
    group.add_argument(
        "--n-pixels", type=_positive_int, metavar="N",
        help="fewest connected pixels of a source of --detect (default: 5)",
    )  # fmt: skip
    group.add_argument(
        "--size", type=_positive_int, metavar="N",
        help="side of the stamps in pixels (default: by the extent of each source)",
    )  # fmt: skip

    group = parser.add_argument_group("model")
    group.add_argument("--model", choices=tuple(MODELS), default="sersic", help="default: sersic")
    group.add_argument(
        "--fix", action="append", default=[], metavar="NAME=VALUE", type=_assignment,
        help="hold a parameter (lengths in pixels, angles in degrees); may be repeated",
    )  # fmt: skip
    group.add_argument(
        "--background", choices=("none", "constant", "tilted"), default="constant",
        help="fitted under each galaxy (default: constant)",
    )  # fmt: skip

    group = parser.add_argument_group("output")
    group.add_argument(
        "-o", "--output", required=True, metavar="FILE", help="catalogue, .fits or .ecsv"
    )
    group.add_argument("--overwrite", action="store_true", help="replace files that exist")
    group.add_argument(
        "--plots", metavar="DIR", help="folder for figures: contact sheets and single fits"
    )
    group.add_argument(
        "--checkpoint", metavar="FILE", help="finished batches (default: OUTPUT.checkpoint)"
    )
    group.add_argument("--restart", action="store_true", help="ignore and delete an old checkpoint")
    group.add_argument(
        "--batch-size", type=_positive_int, metavar="N", help="stamps fitted at a time"
    )
    _add_common(parser)


def _positive_int(text: str) -> int:
    value = int(text) if text.strip().isdigit() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be a positive integer, not {text!r}")
    return value


def _positive_float(text: str) -> float:
    value = _number(text)
    if value is None or not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a positive number, not {text!r}")
    return value


def _nonnegative_float(text: str) -> float:
    value = _number(text)
    if value is None or not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number that is not negative, not {text!r}")
    return value


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _assignment(text: str) -> tuple[str, float]:
    name, _, value = text.partition("=")
    number = _number(value)
    if not name or number is None or number != number:
        raise argparse.ArgumentTypeError(f"must be NAME=VALUE, as n=1, not {text!r}")
    return name.strip(), number


# -- entry -------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Parameters
    ----------
    argv : sequence of str, optional
        Arguments; by default those of the process.

    Returns
    -------
    int
        Exit code: 0 done, 1 not one galaxy could be fitted, 2 wrong usage or
        input, 3 internal error, 130 interrupted.

    Examples
    --------
    >>> from galmorph.cli import main
    >>> main(["fit", "nowhere.fits", "-o", "catalog.fits"])
    2
    """
    parser = _parser()
    try:
        args = parser.parse_args(argv)
    except SystemExit as done:  # argparse has said what is wrong, or has shown the help
        return int(done.code or 0)
    if args.version:
        import galmorph

        print(f"galmorph {galmorph.__version__}")
        return OK
    if args.command is None:
        parser.print_help(sys.stderr)
        return BAD_INPUT
    run = {
        "demo": _demo,
        "fit": _fit,
        "catalog": _cli_catalog.run,
        "train": _cli_train.run,
        "weights": _cli_weights.run,
        "calibrate": _cli_calibrate.run,
        "generate": _cli_generate.run,
    }
    command = run[args.command]
    with _short_warnings():
        return _run(command, args)


def _run(command: Callable, args: argparse.Namespace) -> int:
    """Run a subcommand; turn what it raises into one line and an exit code."""
    try:
        return command(args)
    except KeyboardInterrupt:
        _say("interrupted; the same command goes on where it was stopped")
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of our output has gone; nothing that Python writes at exit may complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OK
    except MemoryError:
        text, code = "not enough memory; try a smaller --batch-size or --size", BAD_INPUT
    except (UsageError, OSError, ValueError, TypeError, ImportError) as error:
        text, code = str(error) or type(error).__name__, BAD_INPUT
        if args.debug:
            raise
    except Exception as error:
        text, code = f"{type(error).__name__}: {error} (internal; try --debug)", INTERNAL
        if args.debug:
            raise
    _say(f"error: {' '.join(text.split())}")
    return code


def _say(text: str) -> None:
    print(f"galmorph: {text}", file=sys.stderr)


@contextlib.contextmanager
def _short_warnings() -> Iterator[None]:
    """Warnings as one line each, and each only once."""
    seen = set()

    def show(message, category, filename, lineno, file=None, line=None) -> None:
        text = " ".join(str(message).split())
        if text not in seen:
            seen.add(text)
            _say(f"warning: {text}")

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


@contextlib.contextmanager
def _progress(quiet: bool, what: str) -> Iterator[Callable[[int, int], None] | bool]:
    """Function that is told how far a job is, and shows it on the standard error."""
    if quiet:
        yield False
        return
    import time

    from tqdm import tqdm

    live = sys.stderr.isatty()
    bar, said = None, time.monotonic()

    def report(done: int, total: int) -> None:
        nonlocal bar, said
        if live:
            if bar is None:  # only now, so that no empty bar stands before an error
                bar = tqdm(desc=what, total=total, unit=" galaxies", file=sys.stderr)
            bar.update(done - bar.n)
        elif time.monotonic() - said > 10:  # a log file gets a line now and then
            said = time.monotonic()
            _say(f"{what}: {done} of {total} galaxies")

    try:
        yield report
    finally:
        if bar is not None:
            bar.close()


# -- demo --------------------------------------------------------------------------------


def _demo(args: argparse.Namespace) -> int:
    from galmorph.demo import run_demo

    run_demo(args.output, n_max=args.number, progress=not args.quiet)
    return OK


# -- fit ---------------------------------------------------------------------------------


def _fit(args: argparse.Namespace) -> int:
    output = _check_output(args)
    checkpoint = Path(args.checkpoint or f"{output}.checkpoint")
    if args.restart:
        checkpoint.unlink(missing_ok=True)
    elif checkpoint.exists() and not args.quiet:
        _say(f"going on with what {checkpoint} holds")

    import numpy as np

    from galmorph.images import fit_images

    image = _image_name(args)
    inputs = _read_inputs(args, image)
    model = _make_model(args)
    with _progress(args.quiet, args.model) as report:
        result = fit_images(
            inputs.pop("images"),
            model,
            **inputs,
            size=args.size,
            background=args.background,
            batch_size=args.batch_size,
            checkpoint=checkpoint,
            progress=report,
        )
    result.meta["command"] = "galmorph fit"
    result.write(output, overwrite=args.overwrite)
    if args.plots:
        _draw(result, Path(args.plots), args.model)
    checkpoint.unlink(missing_ok=True)
    if not args.quiet:
        print(_summary(result, output))
    return NOTHING_FITTED if np.all(result.failed) else OK


def _check_output(args: argparse.Namespace) -> Path:
    """Everything that would fail after the fits is looked at before them."""
    output = Path(args.output)
    if not output.name.lower().endswith((".fits", ".fits.gz", ".ecsv")):
        raise UsageError(f"-o {output}: the name must end in .fits or .ecsv")
    _check_writable([output], args.overwrite)
    if args.plots:
        plots = Path(args.plots)
        if plots.exists() and not plots.is_dir():
            raise UsageError(f"--plots {plots} is a file, not a folder")
    for option in ("threshold", "n_pixels"):
        if getattr(args, option) is not None and not args.detect:
            raise UsageError(f"--{option.replace('_', '-')} is an option of --detect")
    _check_psf(args)
    return output


def _check_writable(files: Sequence[Path], overwrite: bool) -> None:
    """Files of one folder."""
    for file in files:
        if file.exists() and not overwrite:
            raise UsageError(f"{file} exists; choose another name, or say --overwrite")
    folder = files[0].parent
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such folder")
    if not os.access(folder, os.W_OK):
        raise UsageError(f"{folder}: no permission to write")


def _check_psf(args: argparse.Namespace) -> None:
    if (args.psf_oversampling or args.psf_without_pixel) and not _is_psf_file(args.psf):
        raise UsageError("--psf-oversampling and --psf-without-pixel describe a PSF file (--psf)")


def _is_psf_file(psf: str | None) -> bool:
    return psf is not None and psf != "auto" and not psf.startswith("fwhm=")


def _image_name(args: argparse.Namespace) -> str:
    if args.ext is None:
        return args.image
    if args.image.endswith("]") and not os.path.exists(args.image):
        raise UsageError(f"{args.image} names an extension; leave --ext out")
    return f"{args.image}[{args.ext}]"


def _read_inputs(args: argparse.Namespace, image: str) -> dict[str, Any]:
    """Arguments of `fit_images` that come from files."""
    uncertainty = _uncertainty(args)
    mask = None if args.mask is None else _mask(args.mask)
    inputs = {"images": _pixels(image), "uncertainty": uncertainty, "mask": mask}
    detection = None
    if args.detect or args.psf == "auto":
        detection = _detect(args, inputs)
    inputs["psf"] = _psf(args, inputs, detection)
    if args.detect:
        inputs["segmentation"] = detection.segmentation
        inputs["positions"] = detection.catalog
        if args.uncertainty is None and detection.settings["noise"] == "measured":
            inputs["uncertainty"] = detection.rms
    elif args.positions is not None:
        inputs["positions"] = _read_table(args.positions)
    return inputs


def _pixels(name: str) -> Any:
    """A path as it is, except for arrays of numpy, which are mapped."""
    if not name.endswith(".npy"):
        return name
    import numpy as np

    try:
        return np.load(name, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise UsageError(f"{name}: no such file") from None
    except (ValueError, OSError, EOFError) as error:
        raise UsageError(f"{name}: cannot be read as an array ({error})") from None


def _array_and_unit(name: str) -> tuple[Any, Any]:
    from galmorph._inputs import make_frame

    frame = make_frame(_pixels(name))
    return frame.data, frame.unit


def _uncertainty(args: argparse.Namespace) -> Any:
    if args.uncertainty is None:
        return None
    from astropy.nddata import InverseVariance, StdDevUncertainty, VarianceUncertainty

    kinds = {"std": StdDevUncertainty, "var": VarianceUncertainty, "ivar": InverseVariance}
    value = _number(args.uncertainty)
    if value is None:
        values, unit = _array_and_unit(args.uncertainty)
        return kinds[args.uncertainty_type](values, unit=unit, copy=False)
    if not 0 < value < float("inf"):
        raise UsageError(f"--uncertainty must be positive, not {args.uncertainty}")
    return value ** {"std": 1.0, "var": 0.5, "ivar": -0.5}[args.uncertainty_type]


def _mask(name: str) -> Any:
    import numpy as np

    values, _ = _array_and_unit(name)
    if np.dtype(values.dtype).kind == "f":  # a mask saved as floats: NaN is bad as well
        values = np.asarray(values[...])
        return ~(values == 0)
    return values


def _psf(args: argparse.Namespace, inputs: dict, detection: Any) -> Any:
    from galmorph.psf import PSF

    if args.psf is None:
        return None
    if args.psf == "auto":
        from galmorph.detection import estimate_psf

        estimate = estimate_psf(inputs["images"], detection)
        if not args.quiet:
            _say(f"PSF: {estimate.statement}")
        return estimate.psf
    if args.psf.startswith("fwhm="):
        fwhm = _number(args.psf.removeprefix("fwhm="))
        if fwhm is None or not 0 < fwhm < 1000:
            raise UsageError(f"--psf {args.psf}: the FWHM must be a positive number of pixels")
        from galmorph.detection import gaussian_psf

        return gaussian_psf(fwhm)
    if not args.psf_oversampling and not args.psf_without_pixel and not args.psf.endswith(".npy"):
        if not os.path.exists(args.psf):
            raise UsageError(f"--psf {args.psf}: no such file")
        return args.psf  # its header may say how it was sampled
    values, _ = _array_and_unit(args.psf)
    options = {
        "oversampling": args.psf_oversampling or 1,
        "includes_pixel": not args.psf_without_pixel,
    }
    if len(values.shape) == 3:
        return [PSF(values[i], **options) for i in range(len(values))]
    return PSF(values, **options)


def _detect(args: argparse.Namespace, inputs: dict) -> Any:
    from galmorph.detection import detect

    options = {"threshold": args.threshold, "n_pixels": args.n_pixels}
    found = detect(
        inputs["images"],
        uncertainty=inputs["uncertainty"],
        mask=inputs["mask"],
        **{name: value for name, value in options.items() if value is not None},
    )
    if args.detect and len(found) == 0:
        raise UsageError(f"{args.image}: no source found; try a lower --threshold")
    if args.detect and not args.quiet:
        _say(f"detected {len(found)} sources")
    return found


def _read_table(name: str) -> Any:
    from astropy.table import QTable

    if not os.path.isfile(name):
        raise UsageError(f"--positions {name}: no such file")
    try:
        return QTable.read(name)
    except Exception as first:
        try:  # no known ending: any text table
            return QTable.read(name, format="ascii")
        except Exception:
            raise UsageError(f"--positions {name}: cannot be read as a table ({first})") from None


def _make_model(args: argparse.Namespace) -> Any:
    import math

    import galmorph

    model = getattr(galmorph, MODELS[args.model])()
    for name, value in args.fix:
        if name not in model.param_names:
            raise UsageError(
                f"--fix {name}: {args.model} has the parameters {', '.join(model.param_names)}"
            )
        setattr(model, name, math.radians(value) if name.startswith("theta") else value)
        model.fixed[name] = True
    return model


# -- what is shown and drawn ----------------------------------------------------------------


def _summary(result: Any, output: Path) -> str:
    import numpy as np

    from galmorph.flags import FitFlag

    n, failed = len(result), int(np.sum(result.failed))
    counts = [
        f"{flag.name} {count}"
        for flag in FitFlag
        if flag.value & (flag.value - 1) == 0
        and (count := int(np.sum((result.flags & flag.value) != 0)))
    ]
    lines = [f"{output}: {n} galaxies, {n - failed} fitted, {failed} not."]
    if counts:
        text = f"flags: {', '.join(counts)}"
        lines.append(textwrap.fill(text, 88, subsequent_indent="  "))
    return "\n".join(lines)


_PER_SHEET, _SHEETS, _SINGLE = 48, 4, 8


def _draw(result: Any, folder: Path, name: str) -> None:
    """Contact sheets of the first galaxies, and figures of the brightest."""
    import matplotlib as mpl
    import numpy as np

    from galmorph import plot

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)

    def save(figure, file: str) -> None:
        figure.savefig(folder / file, dpi=150, bbox_inches="tight")
        plt.close(figure)

    for k, start in enumerate(range(0, min(len(result), _PER_SHEET * _SHEETS), _PER_SHEET)):
        rows = range(start, min(start + _PER_SHEET, len(result)))
        save(plot.contact_sheet({name: result}, list(rows)), f"sheet-{k + 1}.png")
    fitted = np.flatnonzero(~result.failed)
    brightest = fitted[np.argsort(result.params[fitted, 0])[::-1][:_SINGLE]]
    for i in brightest:
        figure, axes = plt.subplots(1, 3, figsize=(11, 3.6), layout="constrained")
        plot.fit(result, int(i), axes=axes)
        save(figure, f"fit-{result.ids[i]}.png")
        figure, ax = plt.subplots(figsize=(5, 4), layout="constrained")
        plot.radial_profile(result, int(i), ax=ax)
        save(figure, f"profile-{result.ids[i]}.png")
