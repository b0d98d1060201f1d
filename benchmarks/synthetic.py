"""Synthetic galaxies beside real ones that no model has seen: distances between distributions.

    python benchmarks/train_default/prepare.py --data FOLDER --out galaxies.npz     (and for EFIGI)
    python benchmarks/synthetic.py --galaxies galaxies.npz efigi.npz --out results/synthetic.txt

Real stamps of Galaxy Zoo 2 and EFIGI (the part held out of all training) and synthetic ones are
measured alike, with statmorph and Sersic fits.  Each synthetic galaxy is seen through a Gaussian
PSF, noise (correlated, and growing with the light), a size and a mask such as the training galaxies
have: drawn from a kernel density of these together with the shapes, never copied.
"""

from __future__ import annotations

import argparse
import logging
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

from _common import Report, one_thread

one_thread()

import numpy as np  # noqa: E402
import statmorph  # noqa: E402
import torch  # noqa: E402
from astropy.utils.decorators import lazyproperty  # noqa: E402
from scipy import ndimage, optimize, special, stats  # noqa: E402

from galmorph import (  # noqa: E402
    BulgeDiskGalaxy2D,
    GalaxyVAE,
    LearnedGalaxy2D,
    SersicGalaxy2D,
    fit_images,
)
from galmorph.detection import gaussian_psf  # noqa: E402
from galmorph.synthetic import textured  # noqa: E402

torch.set_num_threads(1)
logging.getLogger("statmorph").setLevel(logging.ERROR)

MEASURES = ("C", "A", "S", "Gini", "M20", "ellip", "r_half", "n")
SETS = {"gz2": 541, "efigi": 161}  # held out, measured; in the ratio of the training galaxies
SIZE = 64
STRETCH = 9.0  # of the JPEGs, as prepare.py undoes it
OBSERVED = ("ln r", "ln noise / flux", "ln noise per light", "ln FWHM", "correlation")


# -- data --------------------------------------------------------------------------------


def load(paths: list[str]) -> dict[str, np.ndarray]:
    """Stamps of the sets, from what prepare.py writes."""
    names = ("image", "weight", "psf_fwhm", "source", "split", "sersic", "correlation")
    parts = []
    for path in paths:
        file = np.load(path)
        keep = np.isin(file["source"], list(SETS))
        parts.append({name: file[name][keep] for name in names})
    return {name: np.concatenate([p[name] for p in parts]) for name in names}


def choose(data: dict, split: int, share: float, rng: np.random.Generator) -> np.ndarray:
    """Rows of each set, in the same ratio."""
    rows = []
    for name, n in SETS.items():
        own = np.flatnonzero((data["source"] == name) & (data["split"] == split))
        rows.append(rng.permutation(own)[: round(n * share)])
    return np.concatenate(rows)


def read_fits(path: str, data: dict) -> tuple[dict, np.ndarray]:
    """Fits of the training galaxies, and parameters (N, P) of those held out."""
    fits = dict(np.load(path))
    learn = data["split"][fits["rows"]] == 0
    held = fits["params"][~learn]
    for name in ("rows", "params", "cov"):
        fits[name] = fits[name][learn]
    return fits, held


def noise_law(image: np.ndarray, weight: np.ndarray) -> tuple[float, float]:
    """Noise of empty pixels, and noise per light of bright ones: variance = a^2 + (b I)^2."""
    good = weight > 0
    variance, light = 1 / weight[good] ** 2, image[good].clip(0) ** 2
    empty = np.percentile(variance, 25)
    bright = light > np.percentile(light, 97)
    slope = max(((variance - empty)[bright] / light[bright]).mean(), 1e-8)
    return float(np.sqrt(empty)), float(np.sqrt(slope))


def observations(data: dict, rows: np.ndarray, radius: np.ndarray, flux: np.ndarray) -> np.ndarray:
    """How each galaxy was seen, (N, 5): `OBSERVED`."""
    if "law" not in data:
        pairs = zip(data["image"], data["weight"], strict=True)
        data["law"] = np.array([noise_law(image, weight) for image, weight in pairs])
    laws = data["law"][rows]
    correlation = np.nan_to_num(data["correlation"][rows], nan=0.6).clip(0.05, 0.95)
    logit = np.log(correlation / (1 - correlation))
    columns = [np.log(radius), np.log(laws[:, 0] / flux), np.log(laws[:, 1])]
    return np.stack([*columns, np.log(data["psf_fwhm"][rows]), logit], 1)


# -- densities ---------------------------------------------------------------------------


class Scores:
    """Columns (N, d) as normal scores, by their ranks, and back."""

    def __init__(self, values: np.ndarray) -> None:
        self._sorted = np.sort(values, 0)
        self._place = special.ndtri((np.arange(len(values)) + 0.5) / len(values))
        order = values.argsort(0, kind="stable").argsort(0, kind="stable")
        self.scores = self._place[order]

    def of(self, values: np.ndarray) -> np.ndarray:
        """Normal scores of other values (M, d)."""
        scores = np.empty(values.shape)
        for i, column in enumerate(self._sorted.T):
            scores[:, i] = np.interp(values[:, i], column, self._place)
        return scores

    def back(self, scores: np.ndarray) -> np.ndarray:
        """Values of scores (M, d)."""
        values = np.empty(scores.shape)
        for i, column in enumerate(self._sorted.T):
            values[:, i] = np.interp(scores[:, i], self._place, column)
        return values


def kernel(values: np.ndarray, n: int, rng: np.random.Generator) -> np.ndarray:
    """Draws of a kernel density (Scott's rule) of the normal scores of values (N, d)."""
    none = np.zeros((len(values), 0))
    return beside(none, np.zeros((n, 0)), values, rng)


def beside(own: np.ndarray, known: np.ndarray, rest: np.ndarray, rng) -> np.ndarray:
    """The rest (M, k) of galaxies of which some (M, j) is known: from a kernel density of both.

    ``own`` (N, j) and ``rest`` (N, k) are of training galaxies, ``known`` (M, j) of new ones.
    The scatter of each column is that of the training galaxies: kernels are drawn together.
    """
    width = len(own) ** (-1.0 / (own.shape[1] + rest.shape[1] + 4))
    first, second = Scores(own), Scores(rest)
    off = (first.of(known)[:, None] - first.scores) / width
    weight = np.exp(-0.5 * (off**2).sum(-1)).cumsum(1)
    row = (rng.uniform(size=(len(known), 1)) * weight[:, -1:] < weight).argmax(1)
    jitter = rng.multivariate_normal(np.zeros(rest.shape[1]), np.cov(second.scores.T), len(known))
    return second.back(second.scores[row] * np.sqrt(1 - width**2) + width * jitter)


def logit(x: np.ndarray) -> np.ndarray:
    x = np.clip(x, 1e-3, 1 - 1e-3)
    return np.log(x / (1 - x))


# -- observing ---------------------------------------------------------------------------


def with_noise(light: np.ndarray, seen: np.ndarray, mask: np.ndarray, rng) -> tuple:
    """A stamp and its weights."""
    noise, slope = np.exp(seen[1]), np.exp(seen[2])
    sigma = np.sqrt(noise**2 + (slope * light) ** 2)
    correlation = 1 / (1 + np.exp(-seen[4]))
    field = ndimage.gaussian_filter(
        rng.standard_normal(light.shape), 0.5 / np.sqrt(-np.log(correlation)), mode="wrap"
    )
    image = light + sigma * field / field.std()
    return np.where(mask, 0.0, image), np.where(mask, 0.0, 1 / sigma)


def blurred(fwhm: np.ndarray) -> list:
    """PSFs of FWHMs (N,), to a twentieth of a pixel."""
    return [_psf(round(float(f) * 20) / 20) for f in fwhm]


_PSFS: dict[float, object] = {}


def _psf(fwhm: float):
    if fwhm not in _PSFS:
        _PSFS[fwhm] = gaussian_psf(fwhm)
    return _PSFS[fwhm]


def observed(model, params: np.ndarray, seen: np.ndarray, masks: np.ndarray, rng, texture=0.0):
    """Stamps (N, 64, 64) of unit flux with noise, and weights."""
    fwhm = np.exp(seen[:, 3]).clip(1.0, 8.0)
    params = params.copy()
    params[:, 0] = 1.0
    params[:, 1:3] = (SIZE - 1) / 2 + rng.normal(0, 0.5, (len(params), 2))
    images, weights = np.zeros((2, len(params), SIZE, SIZE))
    order = np.argsort(fwhm)
    for rows in np.array_split(order, max(1, len(order) // 60)):
        psf = blurred(np.full(1, np.median(fwhm[rows])))[0]
        light = model.render((SIZE, SIZE), params=params[rows], psf=psf, dtype="float32")
        light = textured(model, params[rows], light, psf, texture, rng)
        for k, image in zip(rows, light, strict=True):
            images[k], weights[k] = with_noise(image, seen[k], masks[k], rng)
    return images, weights, fwhm


# -- measuring ---------------------------------------------------------------------------


class Morphology(statmorph.SourceMorphology):
    """Only what is asked for, with the centre of asymmetry to a hundredth of a pixel: fast."""

    def _calculate_morphology(self) -> None:
        """Everything is calculated when it is asked for."""

    @lazyproperty
    def _asymmetry_center(self) -> np.ndarray:
        start = np.array([self._xc_stamp, self._yc_stamp])
        image = self._cutout_stamp_maskzeroed
        return optimize.fmin(
            self._asymmetry_function, start, args=(image, "cas"), xtol=0.01, ftol=1e-4, disp=False
        )


def morphology(image: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """The first seven of `MEASURES`; NaN where statmorph gives up."""
    failed = np.full(7, np.nan)
    mask = weight <= 0
    noise = 1 / np.percentile(weight[~mask], 75)
    smooth = ndimage.gaussian_filter(np.where(mask, 0.0, image), 1.0)
    labels, _ = ndimage.label((smooth > 1.5 * noise) & ~mask)
    inner = labels[28:36, 28:36]
    if not inner.any():
        return failed
    segment = (labels == np.bincount(inner[inner > 0]).argmax()).astype(int)
    sigma = np.where(mask, noise, 1 / np.where(mask, 1.0, weight))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            m = Morphology(image, segment, 1, mask=mask, weightmap=sigma)
            values = [m.concentration, m.asymmetry, m.smoothness, m.gini, m.m20]
            values += [m.ellipticity_asymmetry, m.rhalf_ellip]
        except Exception:  # statmorph raises many kinds
            return failed
    return np.array(values) if m.flag <= 2 else failed


def measure(images: np.ndarray, weights: np.ndarray, fwhm: np.ndarray) -> np.ndarray:
    """`MEASURES` of stamps, (N, 8), of those that could be measured."""
    images = images.astype(float)
    first = np.array([morphology(i, w) for i, w in zip(images, weights, strict=True)])
    sigma = np.where(weights > 0, 1 / np.where(weights > 0, weights, 1.0), 1.0)
    result = fit_images(
        images,
        SersicGalaxy2D(),
        uncertainty=sigma,
        mask=weights <= 0,
        psf=blurred(np.round(fwhm * 4) / 4),
        background="constant",
    )
    both = np.column_stack([first, np.where(result.failed, np.nan, result.params[:, 4])])
    return both[np.isfinite(both).all(1)]


def distances(real: np.ndarray, mock: np.ndarray) -> np.ndarray:
    """Wasserstein distances of each measure, in units of the scatter of the real galaxies, (8,)."""
    width = [np.subtract(*np.percentile(column, [84, 16])) / 2 for column in real.T]
    return np.array(
        [
            stats.wasserstein_distance(a, b) / w
            for a, b, w in zip(real.T, mock.T, width, strict=True)
        ]
    )


# -- the models --------------------------------------------------------------------------


def learned(data, fits, masks, n, rng, *, population="default", texture=0.0):
    """Stamps of galaxies of the learned model, with the shapes of a population."""
    model = LearnedGalaxy2D.from_pretrained()
    params = model.sample(n, rng, population=population)
    own = fits["params"].astype(float)
    good = np.isfinite(own).all(1) & (own[:, 0] > 0)
    rows, own = fits["rows"][good], own[good]
    seen = observations(data, rows, own[:, 3], own[:, 0])
    seen = beside(own[:, 5:7], params[:, 5:7].clip(-6, 6), seen, rng)
    params[:, 3] = np.exp(seen[:, 0]).clip(1.0, 20.0)
    params[:, 4] = rng.uniform(0, 2 * np.pi, n)
    return observed(model, params, seen, masks, rng, texture)


def sersic(data, fits, masks, n, rng):
    """Stamps of Sersic profiles: a kernel density of the fits of the training galaxies."""
    rows = fits["rows"]
    own = data["sersic"][rows].astype(float)
    good = np.isfinite(own).all(1) & (own[:, 0] > 0)
    rows, own = rows[good], own[good]
    shape = np.stack([np.log(own[:, 4]), logit(own[:, 5])], 1)
    drawn = kernel(np.hstack([shape, observations(data, rows, own[:, 3], own[:, 0])]), n, rng)
    params = np.zeros((n, 7))
    params[:, 3] = np.exp(drawn[:, 2]).clip(1.0, 20.0)
    params[:, 4] = np.exp(drawn[:, 0]).clip(0.2, 8.0)
    params[:, 5] = 1 / (1 + np.exp(-drawn[:, 1]))
    params[:, 6] = rng.uniform(0, np.pi, n)
    return observed(SersicGalaxy2D(), params, drawn[:, 2:], masks, rng)


def bulge_disk(data, fits, masks, n, rng):
    """Stamps of bulges in disks: a kernel density of the fits of training galaxies."""
    rows, own = fits["bulge_disk_rows"], fits["bulge_disk"].astype(float)
    names = BulgeDiskGalaxy2D.param_names
    at = {name: i for i, name in enumerate(names)}
    good = np.isfinite(own).all(1) & (own[:, 0] > 0)
    rows, own = rows[good], own[good]
    half = half_light(own)
    turn = own[:, at["theta_bulge"]] - own[:, at["theta_disk"]]
    columns = [logit(own[:, at[k]]) for k in ("bulge_fraction", "ellip_bulge", "ellip_disk")]
    columns += [np.log(own[:, at["n_bulge"]]), np.log(own[:, at["r_bulge"]] / half)]
    columns += [np.log(own[:, at["r_disk"]] / half), (turn + np.pi / 2) % np.pi - np.pi / 2]
    drawn = kernel(
        np.hstack([np.stack(columns, 1), observations(data, rows, half, own[:, 0])]), n, rng
    )
    radius = np.exp(drawn[:, 7]).clip(1.0, 20.0)
    share, e_bulge, e_disk = (1 / (1 + np.exp(-drawn[:, i])) for i in range(3))
    angle = rng.uniform(0, np.pi, n)
    values = {
        "bulge_fraction": share,
        "r_bulge": radius * np.exp(drawn[:, 4]),
        "n_bulge": np.exp(drawn[:, 3]).clip(0.2, 8.0),
        "ellip_bulge": e_bulge.clip(0, 0.99),
        "theta_bulge": angle + drawn[:, 6],
        "r_disk": radius * np.exp(drawn[:, 5]),
        "ellip_disk": e_disk.clip(0, 0.99),
        "theta_disk": angle,
    }
    params = np.zeros((n, len(names)))
    for name, value in values.items():
        params[:, at[name]] = value
    return observed(BulgeDiskGalaxy2D(), params, drawn[:, 7:], masks, rng)


def half_light(own: np.ndarray) -> np.ndarray:
    """Half-light radius of bulge and disk, by their flux: good to some per cent."""
    at = {name: i for i, name in enumerate(BulgeDiskGalaxy2D.param_names)}
    share = own[:, at["bulge_fraction"]]
    return np.exp(
        share * np.log(own[:, at["r_bulge"]].clip(0.1))
        + (1 - share) * np.log(own[:, at["r_disk"]].clip(0.1))
    )


def preset(name: str):
    """A published system: images as in the JPEGs, the PSF and the typical size in them."""

    def draw(data, fits, masks, n, rng):
        grey = GalaxyVAE.from_pretrained(name).sample(n, rng)
        light = np.sinh(STRETCH / 255.0 * grey) / STRETCH
        border = np.concatenate([light[:, 0], light[:, -1], light[:, :, 0], light[:, :, -1]], 1)
        light -= np.median(border, 1)[:, None, None]
        # 96 pixels of the JPEGs on 64: 1.5, the median scale of the stamps of galmorph as well
        light = np.array([ndimage.zoom(i, SIZE / i.shape[0], order=1) for i in light])
        light /= np.abs(light).sum((1, 2), keepdims=True)
        own = fits["params"].astype(float)
        good = np.isfinite(own).all(1) & (own[:, 0] > 0)
        seen = observations(data, fits["rows"][good], own[good, 3], own[good, 0])
        seen = kernel(seen, n, rng)
        pairs = [with_noise(i, s, m, rng) for i, s, m in zip(light, seen, masks, strict=True)]
        images, weights = (np.array(part) for part in zip(*pairs, strict=True))
        return images, weights, np.full(n, np.exp(np.median(seen[:, 3])))

    return draw


# -- copies ------------------------------------------------------------------------------


def nearest(shapes: np.ndarray, training: np.ndarray) -> np.ndarray:
    """Distance of each canonical image to the nearest of the training galaxies, (N,)."""
    from scipy.spatial.distance import cdist

    return cdist(shapes, training).min(1)


def canonical(params: np.ndarray) -> np.ndarray:
    """Square roots of the light before the telescope, of one size and angle: (N, 32 * 32)."""
    decoder = LearnedGalaxy2D.from_pretrained().shape.decoder(torch.float32)
    z = torch.as_tensor(params[:, 5:].clip(-6, 6), dtype=torch.float32)
    with torch.no_grad():
        mean = decoder(z, 32)[0].flatten(1)
    return (mean / mean.sum(1, keepdim=True)).clamp_min(0).sqrt().numpy()


def copies(fits: np.ndarray, held: np.ndarray, n: int, rng: np.random.Generator, report) -> None:
    """Samples and held-out galaxies: how near are they to training galaxies?"""
    train = canonical(fits[np.isfinite(fits).all(1)])
    other = canonical(rng.permutation(held[np.isfinite(held).all(1)])[:n])
    model = LearnedGalaxy2D.from_pretrained()
    drawn = canonical(model.sample(len(other), rng, population="default"))
    far, near = nearest(other, train), nearest(drawn, train)
    test = stats.ks_2samp(near, far)
    report(f"held-out galaxies   median {np.median(far):.4f}, least {far.min():.4f}")
    report(f"samples             median {np.median(near):.4f}, least {near.min():.4f}")
    report(f"ratio of medians {np.median(near) / np.median(far):.2f}; K-S {test.statistic:.3f}")


# -- all of it ---------------------------------------------------------------------------


def stamps_of(data: dict, rows: np.ndarray) -> tuple:
    """Real stamps, weights and widths of PSFs."""
    return tuple(data[name][rows] for name in ("image", "weight", "psf_fwhm"))


def kept(args: argparse.Namespace, name: str, make: Callable[[], np.ndarray]) -> np.ndarray:
    """Measures that are made once, if there is a place to keep them."""
    if args.cache is None:
        return make()
    path = args.cache / f"{name.replace(' ', '_').replace(',', '')}.npy"
    if not path.exists():
        np.save(path, make())
    return np.load(path)


def run(args: argparse.Namespace, report: Report) -> None:
    """Measure every model."""
    rng = np.random.default_rng(args.seed)
    data = load(args.galaxies)
    fits, other = read_fits(args.fits, data)
    share = args.n / sum(SETS.values())
    held, train = choose(data, 1, share, rng), choose(data, 0, share, rng)
    real = kept(args, "held out", lambda: measure(*stamps_of(data, held)))
    report(f"{len(held)} held-out galaxies, {len(real)} measured")
    report("Wasserstein distances to them, in units of half the 16-84 % range of each measure:")
    report(f"{'':24s}" + "".join(f"{name:>8s}" for name in MEASURES) + "     sum")
    floor = kept(args, "training", lambda: measure(*stamps_of(data, train)))
    models = {
        "Sersic": sersic,
        "bulge + disk": bulge_disk,
        **{name: preset(name) for name in args.presets},
        "learned, prior N(0, I)": partial(learned, population=None),
        "learned": learned,
        "learned, texture 0.5": partial(learned, texture=0.5),
    }
    found = {"training galaxies": distances(real, floor)}
    line(report, "training galaxies", found["training galaxies"])
    masks = data["weight"][rng.choice(fits["rows"], args.n)] <= 0
    for name, draw in models.items():
        mock = kept(
            args,
            name,
            lambda draw=draw: measure(
                *draw(data, fits, masks, args.n, np.random.default_rng(args.seed))
            ),
        )
        found[name] = distances(real, mock)
        line(report, name, found[name])
    report()
    for ours in ("learned", "learned, texture 0.5"):
        for name in ("Sersic", "bulge + disk", *args.presets):
            better = int((found[ours] < found[name]).sum())
            report(
                f"{ours} against {name}: lower in {better} of 8, "
                f"sum {found[ours].sum():.2f} against {found[name].sum():.2f}"
            )
    report()
    report("Nearest training galaxy, between square roots of canonical light:")
    copies(fits["params"], other, args.n, rng, report)


def line(report: Report, name: str, values: np.ndarray) -> None:
    """One row of the table."""
    report(f"{name:24s}" + "".join(f"{v:8.3f}" for v in values) + f"{values.sum():8.2f}")


def main(argv: list[str] | None = None) -> int:
    """Parse the arguments, run, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--galaxies", nargs="+", required=True, help="from prepare.py")
    parser.add_argument("--fits", required=True, help="of train_population.py")
    parser.add_argument("--presets", nargs="*", default=[], help="names of installed weights")
    parser.add_argument("--n", type=int, default=702, help="galaxies of each kind")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--cache", type=Path, help="folder for measures: a run that goes on")
    parser.add_argument("--out")
    args = parser.parse_args(argv)
    report = Report("Synthetic galaxies beside held-out real ones")
    run(args, report)
    report.write(args.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
