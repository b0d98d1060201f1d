"""``galmorph calibrate``: fit simulated galaxies and compare with the truth."""

from __future__ import annotations

import argparse
import math
import sys
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from galmorph.calibration import Calibration
    from galmorph.priors import Prior

__all__ = ["add_parser", "run"]

_EPILOG = """\
examples:
  Sersic fits of a survey with a PSF of 3 pixels, with the S/N from 20 to 200:
    galmorph calibrate --psf fwhm=3 --snr loguniform:20:200 \\
        --prior r_eff=lognormal:4:0.4 --prior n=lognormal:2:0.7:0.5:6 \\
        --prior ellip=uniform:0:0.8 --prior theta=uniform:-90:90 \\
        -o calibration.ecsv --plots figures

  The same from a file, and more galaxies:
    galmorph calibrate sersic.toml --n 5000 -o calibration.ecsv

  Learned galaxies by their encoder:
    galmorph calibrate --model learned --fitter encoder --psf fwhm=3 --snr 100 \\
        --prior r_50=uniform:3:8 --prior theta=uniform:-180:180 -o learned.ecsv

priors:
  uniform:LOW:HIGH  loguniform:LOW:HIGH  normal:MEAN:STD  lognormal:MEDIAN:SIGMA
  Two more numbers are limits: lognormal:2:0.7:0.5:6. Lengths are in pixels, angles in
  degrees. The centre is near the middle of the stamp, latents are drawn from their own
  prior; what else has no prior is the same in all galaxies (--set), though it is fitted.

a configuration has the same options; the command line goes before it, and its paths are
relative to it:
  model = "sersic"
  fitter = "importance"
  psf = "psf.fits"
  noise = 1.0
  shape = [64, 64]
  n = 1000
  [prior]
  flux = "loguniform:500:20000"
  r_eff = "lognormal:4:0.4"

what comes out:
  The summary of every parameter, as printed: median and scatter of (fit - truth) / sigma
  (0 and 1 if right), how often 68 % intervals hold the truth, and the probability that ranks
  are as uneven by chance. The file has truth, rank and pull of every galaxy; read it with
    galmorph.calibration.Calibration.read("calibration.ecsv")

exit codes:
  0    done; the numbers say whether the uncertainties are right
  1    done, but not one galaxy could be fitted
  2    wrong usage or input
  3    internal error: please report it, with the output of --debug
  130  interrupted
"""

_FITTERS = {
    "map": "MAPFitter",
    "encoder": "EncoderFitter",
    "importance": "ImportanceFitter",
    "mcmc": "MCMCFitter",
}
_SAMPLERS = ("importance", "mcmc")
_PRIORS = {
    "uniform": "Uniform",
    "loguniform": "LogUniform",
    "normal": "Normal",
    "lognormal": "LogNormal",
}
_LEARNED = "learned"
_DEFAULTS: dict[str, Any] = {
    "model": "sersic",
    "weights": None,
    "fitter": "map",
    "prior": {},
    "set": {},
    "fix": {},
    "psf": None,
    "noise": "1",
    "snr": None,
    "shape": [64, 64],
    "background": "none",
    "n": 1000,
    "draws": 199,
    "seed": 0,
}


def add_parser(subparsers) -> None:
    """Add the subcommand.

    Parameters
    ----------
    subparsers : argparse action
        Of ``ArgumentParser.add_subparsers``.
    """
    parser = subparsers.add_parser(
        "calibrate",
        help="see whether uncertainties are right, on simulated galaxies",
        description="Fit simulated galaxies and compare posteriors with the truth.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "config", nargs="?", metavar="CONFIG.toml", help="the options below; see there"
    )
    _add_options(parser)
    group = parser.add_argument_group("output")
    group.add_argument("-o", "--output", required=True, metavar="FILE", help="table, .ecsv")
    group.add_argument("--overwrite", action="store_true", help="replace files that exist")
    group.add_argument("--plots", metavar="DIR", help="folder for figures")
    group.add_argument("-q", "--quiet", action="store_true", help="no progress, no summary")
    group.add_argument(
        "--debug", action="store_true", help="show where an error came from (traceback)"
    )


def _add_options(parser: argparse.ArgumentParser) -> None:
    """What a configuration may hold as well; not given is None."""
    from galmorph.cli import MODELS, _positive_int

    group = parser.add_argument_group("galaxies")
    models = tuple(dict.fromkeys([*MODELS, _LEARNED]))
    group.add_argument("--model", choices=models, help="default: sersic")
    group.add_argument("--weights", metavar="NAME", help="of the learned model")
    group.add_argument(
        "--prior", action="append", type=_pair, metavar="NAME=PRIOR",
        help="of a parameter, as flux=loguniform:100:10000; may be repeated",
    )  # fmt: skip
    group.add_argument(
        "--set", action="append", type=_pair, metavar="NAME=VALUE",
        help="the value of a parameter in all galaxies; may be repeated",
    )  # fmt: skip
    group.add_argument(
        "--fix", action="append", type=_pair, metavar="NAME=VALUE",
        help="the same, and the fit knows it; may be repeated",
    )  # fmt: skip
    group.add_argument(
        "--snr", metavar="VALUE|PRIOR", help="matched-filter S/N, in place of a prior of the flux"
    )
    group = parser.add_argument_group("images")
    group.add_argument("--psf", metavar="FILE|fwhm=F", help="PSF image, or a Gaussian of F pixels")
    group.add_argument(
        "--noise", metavar="VALUE|FILE", help="standard deviation of the pixels (default: 1)"
    )
    group.add_argument(
        "--shape", nargs=2, type=_positive_int, metavar=("NY", "NX"), help="default: 64 64"
    )
    group = parser.add_argument_group("fits")
    group.add_argument("--fitter", choices=tuple(_FITTERS), help="default: map")
    group.add_argument(
        "--background", choices=("none", "constant", "tilted"),
        help="fitted under each galaxy (default: none)",
    )  # fmt: skip
    group.add_argument("--n", type=_positive_int, metavar="N", help="galaxies (default: 1000)")
    group.add_argument(
        "--draws", type=_positive_int, metavar="N", help="of each posterior (default: 199)"
    )
    group.add_argument("--seed", type=int, metavar="N", help="default: 0")


def run(args: argparse.Namespace) -> int:
    """Run the subcommand.

    Parameters
    ----------
    args : Namespace
        ``config``, ``output``, ``overwrite``, ``plots``, ``quiet`` and the options.

    Returns
    -------
    int
        0 done, 1 not one galaxy could be fitted.

    Raises
    ------
    ValueError, TypeError, OSError
        If something has to be changed by the user.
    """
    from galmorph import cli
    from galmorph.calibration import calibrate

    output = _check_output(args)
    options = _options(args)
    model = _model(options)
    snr = options["snr"]
    if snr is None and not any("flux" in options[key] for key in ("prior", "set", "fix")):
        raise ValueError("say how bright the galaxies are: --snr, --prior flux=... or --set flux=")
    with cli._progress(args.quiet, "calibrate") as report:
        found = calibrate(
            model,
            _fitter(options),
            prior={name: _prior(name, text) for name, text in options["prior"].items()},
            psf=_psf(options["psf"]),
            noise=_noise(options["noise"]),
            snr=_value_or_prior("snr", snr),
            shape=tuple(options["shape"]),
            background=options["background"],
            n=options["n"],
            draws=options["draws"],
            rng=options["seed"],
            progress=report,
        )
    found.meta["command"] = "galmorph calibrate"
    found.write(output, overwrite=args.overwrite)
    if not found.used.any():
        return cli.NOTHING_FITTED
    if args.plots:
        _draw(found, Path(args.plots))
    if not args.quiet:
        sys.stdout.write(_summary(found, output))
    return cli.OK


def _check_output(args: argparse.Namespace) -> Path:
    """What would fail after the fits is looked at before them."""
    output = Path(args.output)
    if output.suffix.lower() != ".ecsv":
        raise ValueError(f"-o {output}: the name must end in .ecsv")
    if output.exists() and not args.overwrite:
        raise ValueError(f"{output} exists; choose another name, or say --overwrite")
    if not output.parent.is_dir():
        raise ValueError(f"{output.parent}: no such folder")
    if args.plots and Path(args.plots).exists() and not Path(args.plots).is_dir():
        raise ValueError(f"--plots {args.plots} is a file, not a folder")
    return output


# -- options -------------------------------------------------------------------------------


def _options(args: argparse.Namespace) -> dict[str, Any]:
    """Defaults, over which goes the configuration, over which goes the command line."""
    options = dict(_DEFAULTS)
    for given in ([] if args.config is None else [_read_config(args.config)]) + [vars(args)]:
        for key in _DEFAULTS:
            value = given.get(key)
            if value is None:
                continue
            options[key] = options[key] | dict(value) if key in ("prior", "set", "fix") else value
    return options


def _read_config(path: str) -> dict[str, Any]:
    """Options of a TOML file, checked as those of the command line."""
    try:
        table = tomllib.loads(Path(path).read_text())
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path}: {error}") from None
    unknown = set(table) - set(_DEFAULTS)
    if unknown:
        raise ValueError(f"{path}: no option {sorted(unknown)[0]!r}, but {', '.join(_DEFAULTS)}")
    words: list[str] = []
    for key, value in table.items():
        if key in ("psf", "noise"):
            value = _beside(path, str(value))
        if isinstance(value, dict):
            words += [f"--{key}={name}={text}" for name, text in value.items()]
        elif isinstance(value, list):
            words += [f"--{key}", *map(str, value)]
        else:
            words.append(f"--{key}={value}")
    parser = _Parser(add_help=False)
    _add_options(parser)
    try:
        return vars(parser.parse_args(words))
    except argparse.ArgumentTypeError as error:
        raise ValueError(f"{path}: {error}") from None


def _beside(path: str, value: str) -> str:
    """A file that a configuration names, from where the command is given; else as it is."""
    file = Path(path).parent / value.partition("[")[0]
    return str(Path(path).parent / value) if file.exists() else value


class _Parser(argparse.ArgumentParser):
    """One that raises what it finds wrong, for the caller to say where."""

    def error(self, message: str) -> None:
        raise argparse.ArgumentTypeError(message)


def _pair(text: str) -> tuple[str, str]:
    name, _, value = (part.strip() for part in text.partition("="))
    if not name or not value:
        raise argparse.ArgumentTypeError(f"must be NAME=..., not {text!r}")
    return name, value


def _number(name: str, text: str) -> float:
    """A number as the user gives it, angles in degrees, as galmorph has it."""
    try:
        value = float(text)
    except ValueError:
        raise ValueError(f"{name}: {text!r} is not a number") from None
    return math.radians(value) if name.startswith("theta") else value


def _prior(name: str, text: str) -> Prior:
    from galmorph import priors

    kind, *words = str(text).split(":")
    if kind not in _PRIORS or len(words) not in (2, 4):
        raise ValueError(f"prior of {name}: must be as uniform:0:1, not {text!r}; see --help")
    numbers = [_number(name, word) for word in words]
    prior = getattr(priors, _PRIORS[kind])(*numbers[:2])
    return prior if len(numbers) == 2 else priors.Truncated(prior, *numbers[2:])


def _value_or_prior(name: str, text: str | None) -> float | Prior | None:
    if text is None:
        return None
    return _prior(name, text) if ":" in text else _number(name, text)


def _model(options: dict[str, Any]) -> Any:
    import galmorph
    from galmorph.cli import MODELS

    if options["model"] == _LEARNED:
        names = [] if options["weights"] is None else [options["weights"]]
        model = galmorph.LearnedGalaxy2D.from_pretrained(*names)
    elif options["weights"] is not None:
        raise ValueError("--weights are those of the learned model")
    else:
        model = getattr(galmorph, MODELS[options["model"]])()
    for option in ("set", "fix"):
        for name, text in options[option].items():
            if name not in model.param_names:
                raise ValueError(
                    f"--{option} {name}: {options['model']} has the parameters "
                    f"{', '.join(model.param_names)}"
                )
            setattr(model, name, _number(name, text))
            if option == "fix":
                model.fixed[name] = True
    return model


def _fitter(options: dict[str, Any]) -> Any:
    import galmorph

    kind = options["fitter"]
    return getattr(galmorph, _FITTERS[kind])(
        **({"rng": options["seed"]} if kind in _SAMPLERS else {})
    )


def _psf(text: str | None) -> Any:
    """The PSF as ``galmorph fit`` takes it, but for one that is measured."""
    from galmorph import PSF, cli

    if text is None:
        return None
    if text == "auto":
        raise ValueError("--psf auto measures stars, of which there are none here")
    told = argparse.Namespace(psf=text, psf_oversampling=None, psf_without_pixel=False)
    psf = cli._psf(told, {}, None)
    if isinstance(psf, list):
        raise ValueError(f"--psf {text}: one PSF is needed, not a cube")
    return PSF.from_any(psf)


def _noise(text: str) -> Any:
    from galmorph import cli

    value = cli._number(text)
    return cli._array_and_unit(text)[0] if value is None else value


# -- what is shown -------------------------------------------------------------------------


def _summary(found: Calibration, output: Path) -> str:
    failed = len(found) - int(found.used.sum())
    lines = found.to_table().pformat(max_lines=-1, max_width=-1)
    return "\n".join([f"{output}: {len(found)} galaxies, {failed} failed.", *lines, ""])


def _draw(found: Calibration, folder: Path) -> None:
    import matplotlib as mpl

    from galmorph import plot

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    figures = {
        "ranks": plot.rank_histograms(found)[0].figure,
        "coverage": plot.coverage(found).figure,
        "pulls": plot.pulls(found)[0].figure,
    }
    for name, figure in figures.items():
        figure.savefig(folder / f"{name}.png", dpi=150, bbox_inches="tight")
        plt.close(figure)
