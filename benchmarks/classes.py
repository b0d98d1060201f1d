"""Classes without labels, against Hubble types, spiral arms, and what should not matter.

    python benchmarks/classes.py --data FOLDER

Galaxies of Galaxy Zoo 2 and EFIGI.  The classes of galmorph are compared with those of the preset
astrovader2020 (its own mixture), of principal components of the images with a mixture, and of
the parameters of statmorph with a mixture; agreement is measured on galaxies that galmorph was not
trained on (the preset has seen most of them).
"""

from __future__ import annotations

import argparse
import resource
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

from _common import RESULTS, Report, one_thread

one_thread()

import numpy as np  # noqa: E402
import torch  # noqa: E402
from astropy.io import fits  # noqa: E402
from scipy import ndimage  # noqa: E402
from sklearn.decomposition import PCA  # noqa: E402
from sklearn.mixture import GaussianMixture  # noqa: E402
from sklearn.preprocessing import StandardScaler  # noqa: E402
from train_classes import SETS  # noqa: E402
from train_classes import held_out as unseen_rows  # noqa: E402
from train_published import SIDES, resampled  # noqa: E402

from galmorph import GalaxyClassifier, GalaxyVAE  # noqa: E402
from galmorph.agreement import agreement, linear_probe, mutual_information  # noqa: E402
from galmorph.latents import measure_latents  # noqa: E402
from galmorph.nets.learned import noise_of  # noqa: E402
from galmorph.sdss import unstretch  # noqa: E402

#: Hubble types: E, S0, early S, late S, Irr begin above these T.
STAGES = (-3.5, 0.5, 4.5, 9.5)
#: Least noise of these images, grey levels.
FLOOR = 0.3
#: Of the PSF of the images, pixels of the file.
FWHM = {"gz2": 3.2, "efigi": 3.2}
STATMORPH = ("concentration", "asymmetry", "smoothness", "gini", "m20", "ellipticity", "sersic_n")


@dataclass
class Galaxies:
    """Grey images (N, ny, nx) of one file, labels (NaN: unknown), and which were not trained on."""

    name: str
    grey: np.ndarray
    spiral: np.ndarray
    stage: np.ndarray
    unseen: np.ndarray

    def linear(self) -> np.ndarray:
        return unstretch(self.grey)


def read(folder: Path) -> list[Galaxies]:
    found, sizes = {}, []
    for name in SETS:
        with fits.open(folder / f"{name}.fits") as hdus:
            sizes.append(len(hdus["CATALOG"].data))
            if name in SIDES:
                found[name] = hdus["IMAGES"].data, hdus["CATALOG"].data
    unseen = dict(zip(SETS, np.split(unseen_rows(sum(sizes)), np.cumsum(sizes)[:-1]), strict=True))
    galaxies = []
    for name, (grey, table) in found.items():
        none = np.full(len(grey), np.nan)
        spiral, stage = none.copy(), none.copy()
        if "spiral" in table.names:
            spiral = np.where(table["spiral"] >= 0, table["spiral"], np.nan)
        if "T" in table.names:
            stage = np.asarray(table["T"], float)
        galaxies.append(Galaxies(name, np.asarray(grey), spiral, stage, unseen[name]))
    return galaxies


# -- the rivals: each tells latents (N, d) and classes (N,) of grey images -----------------


def noise(linear: np.ndarray) -> np.ndarray:
    return np.maximum(noise_of(linear), FLOOR / 255)[:, None, None] * np.ones_like(linear)


class Ours:
    def __init__(self) -> None:
        self.classifier = GalaxyClassifier.from_pretrained()

    def latents(self, name: str, linear: np.ndarray):
        return measure_latents(linear, uncertainty=noise(linear))

    def proba(self, name: str, linear: np.ndarray) -> np.ndarray:
        return self.classifier.predict_proba(self.latents(name, linear))


class Preset:
    def __init__(self, name: str) -> None:
        self.vae = GalaxyVAE.from_pretrained(name)

    def stamps(self, name: str, linear: np.ndarray) -> np.ndarray:
        grey = np.rint(255 / 9.0 * np.arcsinh(9.0 * linear)).clip(0, 255)
        return resampled(grey.astype(np.float32), SIDES[name], self.vae.image_shape)

    def latents(self, name: str, linear: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            stamps = torch.as_tensor(self.stamps(name, linear))
            return torch.cat([self.vae.encode(s).mean for s in stamps.split(512)]).double().numpy()

    def proba(self, name: str, linear: np.ndarray) -> np.ndarray:
        return self.vae.responsibilities(self.stamps(name, linear))


# -- parts ---------------------------------------------------------------------------------


def labels_of(galaxies: list[Galaxies]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    stage = np.concatenate([g.stage for g in galaxies])
    hubble = np.where(np.isfinite(stage), np.digitize(stage, STAGES), np.nan)
    return np.concatenate([g.spiral for g in galaxies]), hubble, stage


def compared(say: Report, galaxies: list[Galaxies], args: argparse.Namespace) -> None:
    spiral, hubble, stage = labels_of(galaxies)
    unseen = np.concatenate([g.unseen for g in galaxies])
    ours, preset = Ours(), Preset("astrovader2020")
    named, latents = {}, {}
    measured = [ours.latents(g.name, g.linear()) for g in galaxies]
    of_classes = ours.classifier.n_latents
    latents["galmorph, of the classes"] = np.concatenate([m.mean[:, :of_classes] for m in measured])
    latents["galmorph"] = np.concatenate([m.mean for m in measured])
    named["galmorph"] = np.concatenate([ours.classifier.predict(m) for m in measured])
    latents["astrovader2020"] = np.concatenate(
        [preset.latents(g.name, g.linear()) for g in galaxies]
    )
    named["astrovader2020"] = np.concatenate(
        [preset.proba(g.name, g.linear()).argmax(1) for g in galaxies]
    )
    grey = np.concatenate([resampled(g.grey, SIDES[g.name], (64, 64)) for g in galaxies])
    latents["PCA"] = PCA(20, random_state=0).fit_transform(grey.reshape(len(grey), -1))
    if args.statmorph:
        latents["statmorph"] = statmorph_of(galaxies, args.statmorph)
    count = ours.classifier.n_components
    for name in ("galmorph, of the classes", "PCA", "statmorph"):
        if name in latents:
            good = np.isfinite(latents[name]).all(1)
            values = StandardScaler().fit_transform(latents[name][good])
            for k in (count,) if "galmorph" not in name else (5, 12):
                mixture = GaussianMixture(k, n_init=3, random_state=0, reg_covar=1e-4).fit(values)
                told = np.full(len(good), np.nan)
                told[good] = mixture.predict(values)
                title = f"galmorph, {k} refitted" if "galmorph" in name else f"{name} + mixture"
                named[title] = told
    say("\nClasses against labels (adjusted Rand index and normalised mutual information)")
    for title, rows in (
        ("galaxies that were not trained on", unseen),
        ("all", np.ones_like(unseen)),
    ):
        say(f"\n  {title:36s} Hubble: NMI     ARI     spiral: NMI     ARI    classes")
        for name, classes in named.items():
            told = rows & np.isfinite(classes)
            if told.sum() < 0.5 * rows.sum():  # statmorph saw only those not trained on
                continue
            found = [agreement(classes[told], labels[told]) for labels in (hubble, spiral)]
            if not told[rows].all():
                name = f"{name} ({told.sum()} of {rows.sum()})"
            n = len(np.unique(classes[told]))
            say(
                f"    {name:36s} {found[0].nmi:9.3f} {found[0].ari:7.3f}"
                f"      {found[1].nmi:9.3f} {found[1].ari:7.3f}    {n}"
            )
    say("\nLinear probes of the latents (5-fold cross-validation, all galaxies)")
    for name, values in latents.items():
        good = np.isfinite(values).all(1)
        arms = linear_probe(values[good], spiral[good])
        type_ = linear_probe(values[good], stage[good], tolerance=1.5)
        say(
            f"  {name:24s} {values.shape[1]:3d} latents: spiral AUC {arms.score:.3f} +- "
            f"{arms.score_err:.3f};  T within 1.5: {100 * type_.score:.0f} %, rms {type_.rms:.2f}"
        )
    if args.statmorph:
        say("  (statmorph: those of the galaxies that it was run on and has measured)")


def statmorph_of(galaxies: list[Galaxies], file: Path) -> np.ndarray:
    """Parameters of statmorph, of the galaxies that galmorph was not trained on; kept in a file."""
    if file.is_file():
        return np.load(file)
    import statmorph

    rows = []
    for g in galaxies:
        for image, wanted in zip(g.linear(), g.unseen, strict=True):
            rows.append(_statmorph(statmorph, image) if wanted else [np.nan] * len(STATMORPH))
    table = np.array(rows)
    np.save(file, table)
    return table


def _statmorph(statmorph, image: np.ndarray) -> list[float]:
    image = image.astype(float)
    border = np.concatenate([image[:5].ravel(), image[-5:].ravel()])
    level = np.median(border)
    sigma = max(1.4826 * np.median(np.abs(border - level)), FLOOR / 255)
    smooth = ndimage.gaussian_filter(image - level, 1.5)
    labels, _ = ndimage.label(smooth > 1.5 * sigma)
    ny, nx = image.shape
    segment = (labels == labels[ny // 2, nx // 2]) & (labels > 0)
    if segment.sum() < 20:
        return [np.nan] * len(STATMORPH)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = statmorph.SourceMorphology(
                image - level, segment.astype(int), label=1, weightmap=np.full(image.shape, sigma),
                mask=(labels > 0) & ~segment,
            )  # fmt: skip
            names = ("concentration", "asymmetry", "smoothness", "gini", "m20")
            values = [getattr(found, name) for name in names]
            values += [found.ellipticity_asymmetry, found.sersic_n]
    except Exception:  # it fails in many ways
        return [np.nan] * len(STATMORPH)
    values = np.array(values, float)
    return list(np.where(values == -99, np.nan, values))


def changed(linear: np.ndarray, name: str, which: str, rng) -> np.ndarray:
    """The same galaxies observed otherwise."""
    if which == "turned by a quarter":
        return np.ascontiguousarray(np.rot90(linear, axes=(1, 2)))
    if which == "turned by 37 degrees":
        turned = [ndimage.rotate(i, 37, reshape=False, order=3, mode="nearest") for i in linear]
        return np.stack(turned).clip(0)
    if which == "mirrored":
        return np.ascontiguousarray(linear[:, :, ::-1])
    if which == "shifted by a pixel":
        return np.roll(linear, (1, 1), axis=(1, 2))
    if which == "1.5 x PSF":
        sigma = np.sqrt(1.5**2 - 1) * FWHM[name] / 2.3548
        return ndimage.gaussian_filter(linear, (0, sigma, sigma))
    sky = np.stack([i[_border(i.shape)] for i in linear])
    sigma = 1.4826 * np.median(np.abs(sky - np.median(sky, 1)[:, None]), 1)
    sigma = np.maximum(sigma, FLOOR / 255)[:, None, None]
    if which == "twice the noise":
        return linear + np.sqrt(3) * sigma * rng.standard_normal(linear.shape).astype("f4")
    # a companion: another galaxy, of a tenth to a half of the light, half as large
    small = ndimage.zoom(linear[rng.permutation(len(linear))], (1, 0.5, 0.5), order=1)
    out = linear.copy()
    side = small.shape[1]
    light = np.maximum(small - np.median(sky, 1)[:, None, None], 0)
    share = rng.uniform(0.1, 0.5, len(linear)) * linear.sum((1, 2)) / light.sum((1, 2))
    for i in range(len(linear)):
        angle, far = rng.uniform(0, 2 * np.pi), 0.3 * linear.shape[1]
        y, x = (int(0.5 * (linear.shape[1] - side) + far * f(angle)) for f in (np.sin, np.cos))
        y, x = (np.clip(v, 0, linear.shape[1] - side) for v in (y, x))
        out[i, y : y + side, x : x + side] += share[i] * light[i]
    return out


def _border(shape: tuple[int, int]) -> np.ndarray:
    edge = np.ones(shape, bool)
    edge[4:-4, 4:-4] = False
    return edge


CHANGES = (
    "turned by a quarter",
    "turned by 37 degrees",
    "mirrored",
    "shifted by a pixel",
    "1.5 x PSF",
    "twice the noise",
    "with a companion",
)


def nuisances(say: Report, galaxies: list[Galaxies]) -> None:
    say("\nThe same class if the galaxy is observed otherwise (%), galaxies not trained on")
    say(f"  {'':24s} galmorph (where p > 0.8)    astrovader2020 (where p > 0.8)")
    rivals = Ours(), Preset("astrovader2020")
    chosen = [(g.name, g.linear()[g.unseen]) for g in galaxies]
    before = [np.concatenate([r.proba(n, i) for n, i in chosen]) for r in rivals]
    for which in CHANGES:
        rng = np.random.default_rng(3)
        other = [(n, changed(i, n, which, rng)) for n, i in chosen]
        line = f"  {which:24s}"
        for rival, proba in zip(rivals, before, strict=True):
            after = np.concatenate([rival.proba(n, i) for n, i in other])
            same = after.argmax(1) == proba.argmax(1)
            sure = proba.max(1) > 0.8
            share, of_sure = 100 * same.mean(), 100 * same[sure].mean()
            line += f"   {share:5.1f} ({of_sure:5.1f}, {sure.sum():4d})     "
        say(line)
    angle = np.concatenate([_angles(g.linear()) for g in galaxies])
    for rival, title in zip(rivals, ("galmorph", "astrovader2020"), strict=True):
        classes = np.concatenate([rival.proba(g.name, g.linear()).argmax(1) for g in galaxies])
        found, err = mutual_information(classes, angle, rng=1)
        say(f"  mutual information of class and position angle, {title}: {found:.4f} +- {err:.4f}")
    ours = rivals[0]
    name, linear = chosen[0]
    alone = np.concatenate([ours.proba(name, linear[i : i + 1]) for i in range(50)])
    say(f"  largest change with the batch: {np.abs(alone - before[0][:50]).max():.1e}")


def _angles(linear: np.ndarray) -> np.ndarray:
    """Of the light above the sky within a third of the image, from its moments."""
    ny, nx = linear.shape[1:]
    y, x = np.mgrid[:ny, :nx] - 0.5 * np.array([ny - 1, nx - 1])[:, None, None]
    window = np.exp(-0.5 * (x**2 + y**2) / (nx / 6) ** 2)
    light = np.sqrt(np.maximum(linear - np.median(linear, (1, 2))[:, None, None], 0)) * window
    xx, yy, xy = ((light * m).sum((1, 2)) for m in (x * x, y * y, x * y))
    return 0.5 * np.arctan2(2 * xy, xx - yy) % np.pi


def speed(say: Report, galaxies: list[Galaxies], count: int) -> None:
    """A memory map of many stamps, one core."""
    import tempfile

    stamps = unstretch(galaxies[0].grey[:1000, 21:85, 21:85])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "stamps.npy"
        cube = np.lib.format.open_memmap(path, "w+", "f4", (count, 64, 64))
        for i in range(0, count, 1000):
            cube[i : i + 1000] = stamps[: count - i]
        del cube
        classifier = GalaxyClassifier.from_pretrained()
        cube = np.load(path, mmap_mode="r")
        classifier.predict(cube[:200])
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        started = time.process_time()
        classifier.predict_proba(cube)
        seconds = time.process_time() - started
        after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    say(
        f"\n{count} stamps of 64 x 64 pixels, noise estimated: {count / seconds:.0f} a second "
        f"of one core, {after - before:.0f} MB more memory"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--statmorph", type=Path, help="keep, or take, its parameters here (.npy)")
    parser.add_argument("--stamps", type=int, default=100_000)
    parser.add_argument("--out", type=Path, default=RESULTS / "classes.txt")
    parser.add_argument("--parts", nargs="+", default=["compared", "nuisances", "speed"])
    args = parser.parse_args()
    torch.set_num_threads(1)
    say = Report("Classes without labels")
    galaxies = read(args.data)
    if "speed" in args.parts:  # first: what the other parts need would hide what this needs
        speed(say, galaxies, args.stamps)
    if "compared" in args.parts:
        compared(say, galaxies, args)
    if "nuisances" in args.parts:
        nuisances(say, galaxies)
    say.write(args.out)


if __name__ == "__main__":
    main()
