"""Single-Sersic fits of simulated galaxies: galmorph and its peers against the Cramer-Rao floor.

python benchmarks/sersic.py --seed 1 --peers-python PEERS/bin/python

The set is that of simulate.py. ``err`` is the median of |error| / truth over the median of
0.6745 sigma_CRB / truth: 1 is perfect. A fit that failed counts as an infinite error. The floor
is that of the model that is fitted: 7 parameters, or 8 where a constant background is free.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from _common import RESULTS, Report, one_thread, version

one_thread()

import numpy as np  # noqa: E402
from _peers import PEERS  # noqa: E402
from simulate import PARAMS, sersic_set  # noqa: E402

JUDGED = {"flux": 0, "r_eff": 3, "n": 4, "q": 5}
LABELS = ("flux", "x_0", "y_0", "r_eff", "n", "q", "theta")
PSFS = ("psf51", "psf25", "psf_over")

NOTES = """\
err       median |error|/truth over median 0.6745 sigma_CRB/truth; 1 is perfect.
(err*)    median of |error| / (0.6745 sigma_CRB), each galaxy over its own floor.
catastr.  failed, or flux or r_eff wrong by more than a factor 2 either way.
> 6 sig   flux, r_eff, n or q more than 6 sigma_CRB off.
pull      (fit - truth) / its error: standard deviation, 1.4826 MAD, and mean.
68 %      share of galaxies whose 68.27 % interval holds the truth.
theta     only galaxies with q < 0.9 (an angle of a round galaxy is not defined).
CPU       process time of one thread a galaxy, without imports and compilation."""


def fit_galmorph(made: dict, psf_key: str, background: str, batch_size: int | None) -> dict:
    """Fit with `galmorph.fit_images` and its default options."""
    import galmorph

    psf = galmorph.PSF(
        made[psf_key], oversampling=int(made["oversampling"]) if psf_key == "psf_over" else 1
    )

    def fit(part):
        return galmorph.fit_images(
            made["data"][part],
            galmorph.SersicGalaxy2D(),
            uncertainty=np.broadcast_to(made["sigma"][part, None, None], made["data"][part].shape),
            psf=psf,
            background=background,
            batch_size=batch_size,
        )

    fit(slice(0, 4))  # imports and tables are not counted
    start = time.process_time()
    result = fit(slice(None))
    cpu = time.process_time() - start
    order = [result.param_names.index(p) for p in PARAMS]
    flags = np.asarray(result.flags)
    return {
        "params": result.params[:, order],
        "errors": result.stds[:, order],
        "cpu": np.full(len(flags), cpu / len(flags)),
        "messages": [
            f"{name}: {count}" for name, count in _flag_counts(flags, galmorph.FitFlag) if count
        ],
        "n_iter": np.asarray(result.n_iter),
    }


def _flag_counts(flags, flag_type) -> list[tuple[str, int]]:
    return [(f.name, int(np.count_nonzero(flags & int(f)))) for f in flag_type]


def fit_peer(name: str, made: dict, python: str, n: int | None) -> dict | str:
    """Fit with one peer in its own process; a string says why there is no result."""
    distribution = PEERS[name][1]
    if python == sys.executable and version(distribution) == "not installed":
        return f"{distribution} is not installed"
    with tempfile.TemporaryDirectory() as folder:
        source, out = Path(folder) / "set.npz", Path(folder) / "out.npz"
        np.savez(source, **made)
        command = [python, str(Path(__file__).parent / "_peers.py"), name, str(source), str(out)]
        if n is not None:
            command += ["--n", str(n)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if not out.exists():
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            return f"could not run ({last[:150]})"
        with np.load(out) as stored:
            return dict(stored)


def _to_q(params: np.ndarray) -> np.ndarray:
    out = np.array(params, float)
    out[:, 5] = 1 - out[:, 5]
    return out


def score(fit: dict, made: dict, *, background: bool) -> dict:
    """Figures of merit of one fitter on the galaxies that it was given."""
    got, sd = _to_q(fit["params"]), np.array(fit["errors"], float)
    n = len(got)
    truth = _to_q(made["truth"][:n])
    bound = made["crb8" if background else "crb7"][:n]
    difference = got - truth
    difference[:, 6] = (difference[:, 6] + np.pi / 2) % np.pi - np.pi / 2
    finite = np.isfinite(got).all(axis=1)
    size = np.where(finite[:, None], np.abs(difference), np.inf)
    out: dict = {"n": n, "failed": int((~finite).sum())}
    for name, j in JUDGED.items():
        reach = 0.6745 * bound[:, j] / truth[:, j]
        out[f"err {name}"] = np.median(size[:, j] / truth[:, j]) / np.median(reach)
        out[f"err* {name}"] = np.median(size[:, j] / (0.6745 * bound[:, j]))
    ratio = np.where(finite[:, None], got[:, [0, 3]] / truth[:, [0, 3]], np.inf)
    wild = (ratio > 2) | (ratio < 0.5)
    out["catastrophic"] = np.flatnonzero(wild.any(axis=1))
    columns = list(JUDGED.values())
    out["outliers"] = np.flatnonzero((size[:, columns] > 6 * bound[:, columns]).any(axis=1))
    with np.errstate(invalid="ignore", divide="ignore"):
        pull = difference / sd
    pull[truth[:, 5] >= 0.9, 6] = np.nan
    for j, name in enumerate(LABELS):
        p = pull[np.isfinite(pull[:, j]), j]
        if len(p) < 10:
            out[f"pull {name}"] = (np.nan,) * 4
            continue
        mad = 1.4826 * np.median(np.abs(p - np.median(p)))
        out[f"pull {name}"] = (p.std(), mad, p.mean(), np.mean(np.abs(p) < 1))
    out["cpu"] = float(np.mean(fit["cpu"]))
    return out


def _row(name: str, s: dict) -> str:
    errors = " ".join(f"{s[f'err {k}']:5.2f}" for k in JUDGED)
    own = " ".join(f"{s[f'err* {k}']:5.2f}" for k in JUDGED)
    return (
        f"{name:30s} {1e3 * s['cpu']:9.2f}   {errors}   ({own})  "
        f"{len(s['catastrophic']):3d}/{s['n']:<4d} {s['failed']:4d} {len(s['outliers']):5d}"
    )


def _pulls(name: str, s: dict, report: Report) -> None:
    values = [s[f"pull {k}"] for k in LABELS]
    for i, what in enumerate(("pull std", "pull MAD", "pull mean", "68 % holds")):
        cells = " ".join(f"{v[i]:6.3f}" if np.isfinite(v[i]) else "     -" for v in values)
        report(f"{name if i == 0 else '':30s} {what:11s} {cells}")


def main() -> None:
    """Fit, score, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--n", type=int, default=200, help="galaxies (default 200)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--peers", nargs="*", choices=PEERS, default=list(PEERS), help="which (default all)"
    )
    parser.add_argument(
        "--peers-python", default=sys.executable, help="the Python that has the peers"
    )
    parser.add_argument("--peers-n", type=int, help="galaxies a peer (default: 200, slow ones 30)")
    parser.add_argument("--psf", choices=PSFS, default="psf51", help="what galmorph is given")
    parser.add_argument(
        "--background",
        nargs="+",
        choices=("none", "constant"),
        default=["none", "constant"],
        help="galmorph's fits (default both; the peers fit none)",
    )
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--cache", default="default", help="folder of the simulated sets")
    parser.add_argument("--out", default=None, help="default results/sersic.txt; '-' for none")
    args = parser.parse_args()

    with contextlib.suppress(ImportError):
        import torch

        torch.set_num_threads(1)

    report = Report("Single-Sersic fits of simulated galaxies")
    made = sersic_set(args.n, args.seed, cache=args.cache)
    report(f"set: {args.n} galaxies, seed {args.seed}, galmorph's PSF: {args.psf}")
    for background in (False, True):
        bound = made["crb8" if background else "crb7"]
        truth = _to_q(made["truth"])
        text = ", ".join(
            f"{k} {np.median(0.6745 * bound[:, j] / truth[:, j]):.4f}" for k, j in JUDGED.items()
        )
        report(f"floor, {7 + background} parameters (median 0.6745 sigma/truth): {text}")
    report()

    scores: dict[str, dict] = {}
    notes: list[str] = []
    for background in args.background:
        fit = fit_galmorph(made, args.psf, background, args.batch_size)
        free = background == "constant"
        label = f"galmorph, background={background}"
        scores[label] = score(fit, made, background=free)
        notes.append(
            f"{label}: flags {', '.join(fit['messages']) or 'none'}; iterations: median "
            f"{np.median(fit['n_iter']):.0f}, most {np.max(fit['n_iter'])}; "
            f"catastrophic galaxies {scores[label]['catastrophic'].tolist()}, "
            f"outliers {scores[label]['outliers'].tolist()}"
        )
        if free:
            scores["  the same, over the 7-par. floor"] = score(fit, made, background=False)
        # A peer that fits 30 galaxies is compared with galmorph on the same 30.
        for n in {min(args.n, args.peers_n or PEERS[p][2]) for p in args.peers} - {args.n}:
            if not free:
                part = {k: v[:n] for k, v in fit.items() if k in ("params", "errors", "cpu")}
                scores[f"  the same, first {n}"] = score(part, made, background=False)
    for name in args.peers:
        fit = fit_peer(name, made, args.peers_python, args.peers_n)
        if isinstance(fit, str):
            notes.append(f"{name}: skipped, {fit}")
            continue
        scores[name] = score(fit, made, background=False)
        if len(fit["messages"]):
            notes.append(f"{name}: {len(fit['messages'])} exceptions, first: {fit['messages'][0]}")

    head = " ".join(f"{k:>5s}" for k in JUDGED)
    columns = f"{'err':>5s}{'':20s}{'(err*':>5s}{'':19s})  catastr. fail > 6 sig"
    report(f"{'':30s} {'CPU ms':>9s}   {columns}")
    report(f"{'':30s} {'/gal':>9s}   {head}    {head}")
    for name, s in scores.items():
        report(_row(name, s))
    report()
    ours = scores.get("galmorph, background=none")
    peers = [p for p in args.peers if p in scores]
    if peers and ours:
        report("ratio to galmorph (background=none, as the peers; the same galaxies): CPU, err")
        for name in peers:
            same = scores.get(f"  the same, first {scores[name]['n']}", ours)
            ratios = " ".join(f"{scores[name][f'err {k}'] / same[f'err {k}']:5.2f}" for k in JUDGED)
            report(f"{name:30s} {scores[name]['cpu'] / ours['cpu']:9.1f}   {ratios}")
        report()
    report(f"{'':30s} {'':11s} " + " ".join(f"{k:>6s}" for k in LABELS))
    for name, s in scores.items():
        if "over the 7" not in name:
            _pulls(name, s, report)
    report()
    for note in notes:
        report(note)
    report()
    report(NOTES)
    if peers:
        report(f"peers ran under {_peer_versions(args.peers_python)}")
    report.write(None if args.out == "-" else args.out or RESULTS / "sersic.txt")


def _peer_versions(python: str) -> str:
    code = (
        "import importlib.metadata as m, platform;"
        "print('Python', platform.python_version(), *('%s %s' % (p, m.version(p)) for p in "
        "('petrofit','pyimfit','astrophot','pysersic','astropy','torch','jax','numpy') "
        "if __import__('importlib.util').util.find_spec(p)), sep=', ')"
    )
    done = subprocess.run(
        [python, "-c", code], capture_output=True, text=True, check=False, env=dict(os.environ)
    )
    return done.stdout.strip().replace("Python, ", "Python ")


if __name__ == "__main__":
    main()
