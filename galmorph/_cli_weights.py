"""``galmorph weights``: which trained networks are installed."""

from __future__ import annotations

import argparse
import json
import sys
import textwrap

__all__ = ["add_parser", "run"]

_EPILOG = """\
examples:
  galmorph weights               list them
  galmorph weights regier2015    all that is known of one

Packages provide weights by the entry-point group "galmorph.weights".
"""


def add_parser(subparsers) -> None:
    """Add the subcommand.

    Parameters
    ----------
    subparsers : argparse action
        Of ``ArgumentParser.add_subparsers``.
    """
    parser = subparsers.add_parser(
        "weights",
        help="list the trained networks that are installed",
        description="List the trained networks that are installed, or show one.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", nargs="?", metavar="NAME", help="show all that is known of these")
    parser.add_argument(
        "--debug", action="store_true", help="show where an error came from (traceback)"
    )


def run(args: argparse.Namespace) -> int:
    """Run the subcommand.

    Parameters
    ----------
    args : Namespace
        ``name``, or None for all.

    Returns
    -------
    int
        0.

    Raises
    ------
    WeightsError
        If there are no weights of that name.
    """
    from galmorph.nets import ALIASES, WeightsError, available

    installed = available()
    if args.name is None:
        text = "\n".join(_line(w, ALIASES) for w in installed) or "no weights are installed"
    else:
        wanted = ALIASES.get(args.name, args.name)
        shown = [w for w in installed if w.name == wanted]
        if not shown:
            names = ", ".join(sorted({w.name for w in installed})) or "none"
            raise WeightsError(f"there are no weights {args.name!r}; installed: {names}")
        text = "\n\n".join(_details(w) for w in shown)
    sys.stdout.write(text + "\n")
    return 0


def _line(weights, aliases: dict[str, str]) -> str:
    """Name, provider, size, date and training data, in one line."""
    others = [alias for alias, name in aliases.items() if name == weights.name]
    name = f"{weights.name} ({', '.join(others)})" if others else weights.name
    start = f"{name:20s} {weights.provider:16s}"
    if weights.problem:
        return f"{start} cannot be used: {weights.problem}"
    size = weights.path.stat().st_size / 1e6
    about = weights.metadata
    data = textwrap.shorten(str(about["training_data"]), 80, placeholder=" ...")
    return f"{start} {size:6.1f} MB  {about.get('date', ''):10s}  {data}"


def _details(weights) -> str:
    lines = [f"name: {weights.name}", f"provider: {weights.provider}", f"path: {weights.path}"]
    if weights.problem:
        lines.append(f"cannot be used: {weights.problem}")
    for key, value in weights.metadata.items():
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        lines.append(f"{key}: {text}")
    return "\n".join(lines)
