"""``galmorph train``: train a network on one's own stamps."""

from __future__ import annotations

import argparse
import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from galmorph.training import TrainingResult
    from galmorph.training.config import TrainingConfig

__all__ = ["add_parser", "run"]

_EPILOG = """\
a configuration, say train.toml (paths are relative to it; * must be given):
  [model]
  preset = "regier2015"          # *architecture; or weights = "NAME or FILE" to go on from
  options = {scale = "rms"}      #  of the preset; here, images in any linear unit

  [data]
  images = "stamps.fits[SCI]"    # *FITS cube (N, ny, nx), folder of FITS stamps,
                                 #  .npy, or HDF5 as "stamps.h5[images]"
  uncertainty = "sigma.fits"     #  the same kinds, or a number
  uncertainty_type = "std"       #  or "var", "ivar"
  mask = "mask.fits"             #  pixels that are not 0 are bad; NaN always is
  psf = "psf.fits"               #  one for all, or one per stamp
  conditions = "catalog.fits"    #  table with the columns that the network is told
  shape = [69, 69]               #  cut or pad the stamps about their centre

  [training]
  epochs = 50
  batch_size = 128
  learning_rate = 1e-3
  schedule = "cosine"            #  or "constant", "exponential"
  final_learning_rate = 1e-6     #  at the end of it
  beta = 1.0                     #  weight of the KL term, a list with one per epoch, or
                                 #  cycles as {rise = 5, hold = 5, warmup = 10}
  validation = 0.1               #  fraction that judges and is not trained on
  # prior_warmup = 10            #  epochs before a mixture prior is started (astrovader2020)
  patience = 10                  #  stop if it has not improved for so many epochs
  device = "cpu"                 #  or "cuda"
  precision = "float32"          #  or "bfloat16"
  seed = 1                       #  to get the same weights again

  [augmentation]                 #  without this table: turns and flips
  turns = true                   #  by 90, 180, 270 degrees
  flips = true
  shift = 2                      #  up to so many pixels

  [output]
  weights = "mine.safetensors"   # *the network of the best epoch
  log = "mine.csv"               #  loss curves, one line per epoch, as it goes
  plot = "mine.png"
  training_data = "my survey, r < 20"    # kept in the file of the weights,
  licence = "CC-BY-4.0"                  # as is this

then:
  galmorph train train.toml
  torchrun --nproc-per-node 4 -m galmorph train train.toml --device cuda     (four GPUs)

and use it:
  galmorph.GalaxyVAE.read("mine.safetensors").reconstruct(images)

resuming:
  The state of the run is kept beside the weights (FILE.checkpoint) until it is done. After
  an interruption (Ctrl-C, a crash, the end of a batch job) give the same command again: the
  result is the same as if it had never been stopped.

exit codes:
  0    done; single stamps may have been skipped, the last lines say how many
  1    given up: loss or gradient was not finite many times in a row
  2    wrong usage or input; the message names the key of the configuration
  3    internal error: please report it, with the output of --debug
  130  interrupted; the same command goes on where it was stopped
"""


def add_parser(subparsers) -> None:
    """Add the subcommand.

    Parameters
    ----------
    subparsers : argparse action
        Of ``ArgumentParser.add_subparsers``.
    """
    parser = subparsers.add_parser(
        "train",
        help="train a network on your own stamps",
        description="Train a network on stamps of galaxies, as a TOML file says.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", metavar="CONFIG.toml", help="what to train on what; see below")
    parser.add_argument("--device", metavar="NAME", help="as cuda; instead of training.device")
    parser.add_argument("--overwrite", action="store_true", help="replace weights that exist")
    parser.add_argument(
        "--restart", action="store_true", help="ignore and delete an old checkpoint"
    )
    parser.add_argument("-q", "--quiet", action="store_true", help="no progress, no summary")
    parser.add_argument(
        "--debug", action="store_true", help="show where an error came from (traceback)"
    )


def run(args: argparse.Namespace) -> int:
    """Run the subcommand.

    Parameters
    ----------
    args : Namespace
        ``config``, ``device``, ``overwrite``, ``restart`` and ``quiet``.

    Returns
    -------
    int
        0 done, 1 given up.

    Raises
    ------
    ValueError, TypeError, OSError
        If something has to be changed by the user.
    KeyboardInterrupt
        At Ctrl-C, after the state of the run was written.
    """
    from galmorph.training.config import read_config, run_config

    config = read_config(args.config)
    if config.weights.exists() and not args.overwrite:
        raise ValueError(
            f"{config.path}: output.weights: {config.weights} exists; choose another name, or say "
            "--overwrite"
        )
    main = int(os.environ.get("RANK", "0")) == 0
    quiet = args.quiet or not main
    if config.checkpoint.exists() and not args.restart and not quiet:
        _say(f"going on with what {config.checkpoint} holds")
    try:
        result = run_config(config, device=args.device, resume=not args.restart, progress=not quiet)
    except FloatingPointError as error:
        _say(f"error: {error}")
        return 1
    except KeyboardInterrupt:
        if config.checkpoint.exists() and main:
            _say(f"the state of the training is in {config.checkpoint}")
        raise
    if not quiet:
        sys.stdout.write(_summary(config, result))
    return 0


def _say(text: str) -> None:
    sys.stderr.write(f"galmorph: {text}\n")


def _summary(config: TrainingConfig, result: TrainingResult) -> str:
    files = [str(config.weights), str(config.log)]
    if "plot" in config.output:
        files.append(config.output["plot"])
    return f"{result}\nwritten: {', '.join(files)}\n"
