"""A field, catalogued in one call: magnitudes, stars, what is left, and galaxies put in.

    python benchmarks/catalog.py --data ../shared/data

The field is of KiDS and VIKING (r band), with a catalogue of 2,330 detections, made with ProFound,
that holds nine magnitudes and which bright detections are stars (it misses those that are
saturated).  Galaxies that are put in are draws of the population that ships (learned shapes), so
that no model that is fitted is quite right.
"""

from __future__ import annotations

import argparse
import resource
import time
import warnings
from pathlib import Path

import numpy as np
from _common import RESULTS, Report, one_thread

one_thread()

from astropy import units as u  # noqa: E402
from astropy.io import fits  # noqa: E402
from scipy.ndimage import distance_transform_edt  # noqa: E402
from scipy.spatial import cKDTree  # noqa: E402

from galmorph import PSF, LearnedGalaxy2D, SersicGalaxy2D, fit_images, photometry  # noqa: E402
from galmorph.detection import detect  # noqa: E402
from galmorph.synthetic import draw_galaxies  # noqa: E402

FIELD = "kids_viking_field.fits"
ZERO = 23.9  # AB magnitude of a microjansky
PIXEL = 0.2  # arcsec


def percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def scatter(values: np.ndarray) -> float:
    """Half of the central 68 %."""
    return float(np.diff(np.nanpercentile(values, [16, 84]))[0] / 2) if len(values) else np.nan


# -- the whole field -------------------------------------------------------------------------


def whole(say: Report, path: Path, model: str):
    began = time.perf_counter()
    found = photometry(f"{path}[SCI_R]", model=model, pixel_scale=PIXEL, workers=2)
    wall = time.perf_counter() - began
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    kinds = {type(m).__name__ for m in found.scene.models}
    numbers = ", ".join(
        f"{sum(type(m).__name__ == k for m in found.scene.models)} {k}" for k in sorted(kinds)
    )
    say(f"\nmodel={model!r}: {len(found)} sources ({numbers}) in {wall:.0f} s "
        f"with two processes, {memory:.1f} GiB at most")  # fmt: skip
    failed = int(found.scene.failed.sum())
    say(f"  failed {failed}; from the residual {int(found.scene.added.sum())}; noise factor "
        f"{found.meta['noise_factor']:.2f}")  # fmt: skip
    return found


def against_catalogue(say: Report, found, path: Path) -> None:
    table = found.to_table()
    known = fits.getdata(path, "CATALOG")
    xy = np.column_stack([table["x_0"].value, table["y_0"].value])
    good = np.isfinite(xy).all(1) & np.isfinite(table["mag"].value)
    tree = cKDTree(xy[good])
    # the catalogue counts pixels from 0.5
    distance, index = tree.query(np.column_stack([known["x"], known["y"]]) - 0.5)
    row = np.flatnonzero(good)[index]
    hit = distance < 2
    mag, error = table["mag"].value[row], table["mag_err"].value[row]
    off = mag - known["mag_r"]
    say(
        f"  of {len(known)} detections of the catalogue {hit.sum()} are within 2 pixels of a source"
    )
    say("    r of the catalogue    galaxies  median r - r_cat   scatter   beyond 0.3   our error")
    for low, high in ((16, 19), (19, 20), (20, 21), (21, 22), (22, 23), (23, 24)):
        some = hit & ~known["is_star"] & (known["mag_r"] >= low) & (known["mag_r"] < high)
        say(f"    {low} to {high}              {some.sum():6d}     {np.median(off[some]):+10.3f}"
            f"    {scatter(off[some]):10.3f}   {percent(np.mean(np.abs(off[some]) > 0.3)):>8s}"
            f"   {np.nanmedian(error[some]):10.3f}")  # fmt: skip
    star = known["is_star"] & hit
    told = np.ma.filled(np.ma.asarray(table["star_probability"], dtype=float), np.nan)
    p = np.nan_to_num(told[row])
    for low, high in ((14, 17), (17, 19), (19, 21.5)):
        of = (known["mag_r"] >= low) & (known["mag_r"] < high) & hit
        stars, others = of & star, of & ~star
        say(f"    r {low} to {high}: of {stars.sum()} stars {(p[stars] > 0.5).sum()} are told, "
            f"of {others.sum()} others {(p[others] > 0.5).sum()} are taken for stars")  # fmt: skip
    offs = off[star & (known["mag_r"] > 17)]
    say(
        f"    stars of r > 17: median r - r_cat {np.median(offs):+.3f}, scatter {scatter(offs):.3f}"
    )


def clean_part(data: np.ndarray, path: Path) -> np.ndarray:
    """Pixels away from bright stars, edges of chips and the border."""
    known = fits.getdata(path, "CATALOG")
    bright = np.zeros(data.shape, dtype=bool)
    for row in known[(known["mag_r"] < 17.5) | ~np.isfinite(known["mag_r"])]:
        bright[int(row["y"]), int(row["x"])] = True
    bright |= data > 60  # saturated stars are not in the catalogue
    away = distance_transform_edt(~bright) > 100
    # an edge is a step of the sky from column to column
    column = np.nanmedian(data, axis=0)
    step = np.abs(column[4:] - column[:-4])
    edge = np.zeros(len(column), dtype=bool)
    edge[2:-2] = step > 10 * np.median(step)
    away[:, distance_transform_edt(~edge) < 10] = False
    away[:30] = away[-30:] = False
    away[:, :30] = away[:, -30:] = False
    return away


def residual(say: Report, found, path: Path) -> None:
    noise = found.detection.rms
    part = clean_part(found.detection.data, path)
    sources = found.detection.segmentation.data > 0
    say(f"\nresidual, in units of the noise, in the {percent(part.mean())} of the image that is "
        "away from stars, chip edges and the border")  # fmt: skip
    left = {"photometry": found.scene.residual_image, "data": found.detection.data}
    left["Sersic, one by one"] = one_by_one(found)
    for name, image in left.items():
        off = np.abs(image / noise)
        say(f"    {name:20s} beyond 5 sigma: {100 * np.mean(off[part] > 5):.4f} % of all pixels, "
            f"{100 * np.mean(off[part & sources] > 5):.3f} % of those of sources")  # fmt: skip


def one_by_one(found) -> np.ndarray:
    """What is left of the image if each detection is fitted by itself, neighbours masked."""
    detection = found.detection
    data = np.nan_to_num(detection.data)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit = fit_images(
            data,
            SersicGalaxy2D(),
            uncertainty=detection.rms,
            psf=found.scene.psf,
            segmentation=detection.segmentation,
            positions=detection.catalog,
        )
    total = np.zeros(data.shape)
    for i in np.flatnonzero(~fit.failed):
        model = SersicGalaxy2D(*fit.params[i])
        x, y = (round(float(v)) for v in fit.params[i, 1:3])
        half = int(min(max(8 * fit.params[i, 3], 20), 200))
        low = (max(y - half, 0), max(x - half, 0))
        high = (min(y + half, data.shape[0]), min(x + half, data.shape[1]))
        if high[0] <= low[0] or high[1] <= low[1]:
            continue
        model.x_0, model.y_0 = model.x_0 - low[1], model.y_0 - low[0]
        shape = (high[0] - low[0], high[1] - low[1])
        total[low[0] : high[0], low[1] : high[1]] += model.render(shape, psf=found.scene.psf)
    return data - total


# -- galaxies that are put in --------------------------------------------------------------------


def injected(say: Report, path: Path, model: str, shapes: str, runs: int, side: int, rng) -> None:
    """Galaxies of known flux, with learned or Sersic shapes, in parts of the field."""
    with fits.open(path) as hdus:
        image = hdus["SCI_R"].data.astype(float)
        psf, rms = PSF(hdus["PSF_R"].data), float(hdus["SCI_R"].header["NOISERMS"])
    sky = detect(image, uncertainty=rms)
    data = sky.data
    rows = []
    for _ in range(runs):
        y0, x0 = (int(rng.integers(0, n - side)) for n in data.shape)
        part = data[y0 : y0 + side, x0 : x0 + side].copy()
        truth = galaxies(shapes, rng, side, 30)
        part += light(truth, part.shape, psf)
        found = photometry(
            part * u.uJy, model=model, psf=psf, uncertainty=rms * u.uJy,
            detection={"background": "none"}, classes=False,
        )  # fmt: skip
        before = detect(data[y0 : y0 + side, x0 : x0 + side], uncertainty=rms, background="none")
        rows += matched(found, truth, before)
    mag, hit, off, pull, crowded = np.array(rows).T
    say(
        f"\n{len(rows)} galaxies put in, {runs} parts of {side} x {side} pixels, "
        f"model={model!r}, {shapes} shapes"
    )
    say("    r            put in  found   median dF/F   scatter   pulls: median  width   68 % hold")
    for low, high in ((19, 20.5), (20.5, 21.5), (21.5, 22.5), (22.5, 23.5), (23.5, 24.5)):
        bin_ = (mag >= low) & (mag < high) & (crowded == 0)
        own = bin_ & (hit == 1) & np.isfinite(pull)
        if own.sum() < 3:
            continue
        say(f"    {low} to {high}  {bin_.sum():6d}  {percent(hit[bin_].mean()):>6s}"
            f"   {np.median(off[own]):+10.3f}    {scatter(off[own]):6.3f}    "
            f"{np.median(pull[own]):+8.2f}    {scatter(pull[own]):6.2f}"
            f"    {percent(np.mean(np.abs(pull[own]) < 1)):>6s}")  # fmt: skip
    say(f"    ({int(crowded.sum())} within 4 pixels of a source of the field are left out)")


def galaxies(shapes: str, rng, side: int, count: int) -> tuple:
    """Model, and parameters (count, P) of galaxies whose magnitudes are uniform."""
    model = SersicGalaxy2D() if shapes == "sersic" else LearnedGalaxy2D.from_pretrained()
    mag = rng.uniform(19, 24.5, count)
    params = draw_galaxies(
        model, shape=(side, side), pixel_scale=PIXEL, zero_point=ZERO, magnitudes=mag, rng=rng
    )
    params[:, 1:3] = rng.uniform(25, side - 26, (count, 2))
    return model, params


def light(truth, shape, psf) -> np.ndarray:
    model, params = truth
    total = np.zeros(shape)
    half = 60
    for p in params:
        x, y = (round(float(v)) for v in p[1:3])
        own = p.copy()
        own[1:3] += half - np.array([x, y])
        image = model.render((2 * half + 1, 2 * half + 1), params=own[None], psf=psf)[0]
        low = np.array([y, x]) - half
        a, b = np.maximum(-low, 0), np.minimum(np.array(shape) - low, 2 * half + 1)
        total[low[0] + a[0] : low[0] + b[0], low[1] + a[1] : low[1] + b[1]] += image[
            a[0] : b[0], a[1] : b[1]
        ]
    return total


def matched(found, truth, before) -> list[tuple]:
    """Magnitude, found or not, relative error, pull, and whether another source is there."""
    _, params = truth
    scene = found.scene
    xy = np.array([p[1:3] for p in scene.params]).reshape(-1, 2)
    flux, error = scene.flux, scene.flux_err
    old = before.positions
    rows = []
    for p in params:
        crowded = len(old) and np.hypot(*(old - p[1:3]).T).min() < 4
        distance = np.hypot(*(xy - p[1:3]).T)
        near = np.flatnonzero((distance < 3) & np.isfinite(flux))
        mag = ZERO - 2.5 * np.log10(p[0])
        if not len(near):
            rows.append((mag, 0, np.nan, np.nan, float(crowded)))
            continue
        k = near[np.argmin(distance[near])]
        off = flux[k] - p[0]
        rows.append((mag, 1, off / p[0], off / error[k], float(crowded)))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--parts", nargs="+", default=["field", "injected"])
    parser.add_argument("--models", nargs="+", default=["sersic", "auto"])
    parser.add_argument("--shapes", choices=("learned", "sersic"), default="learned")
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--side", type=int, default=400)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", default=RESULTS / "catalog.txt", help="'-' for none")
    args = parser.parse_args()
    path = args.data / FIELD
    say = Report("A field in one call")
    say("")
    if "field" in args.parts:
        for model in args.models:
            found = whole(say, path, model)
            against_catalogue(say, found, path)
            residual(say, found, path)
    if "injected" in args.parts:
        for model in args.models:
            rng = np.random.default_rng(args.seed)
            injected(say, path, model, args.shapes, args.runs, args.side, rng)
    say.write(None if args.out == "-" else args.out)


if __name__ == "__main__":
    main()
