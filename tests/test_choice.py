"""Models that sources of a scene choose, sources by themselves, fits by several processes."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch

from galmorph import (
    PSF,
    BulgeDiskGalaxy2D,
    LearnedGalaxy2D,
    PointSource2D,
    SersicGalaxy2D,
    deblend,
)
from galmorph.nets.learned import LearnedShape

SIGMA = 0.3
FWHM = 3.0


@pytest.fixture(scope="module")
def psf():
    y, x = np.mgrid[-12:13, -12:13]
    return PSF(np.exp(-(x**2 + y**2) / (2 * (FWHM / 2.3548) ** 2)))


@pytest.fixture(scope="module")
def sky(psf):
    """A grid of 120 sources, half of them stars, with sizes as the prior has them."""
    rng = np.random.default_rng(5)
    shape, positions = (300, 360), []
    image = np.zeros(shape)
    is_star = rng.random(120) < 0.5
    for k in range(120):
        x, y = 15 + 30 * (k % 12), 15 + 30 * (k // 12)
        flux = 10 ** rng.uniform(1.6, 3.2)
        if is_star[k]:
            model = PointSource2D(flux, x, y)
        else:
            model = SersicGalaxy2D(
                flux, x, y,
                r_eff=min(0.7 * FWHM * np.exp(0.6 * rng.standard_normal()), 6.0),
                n=np.clip(2 * np.exp(0.7 * rng.standard_normal()), 0.5, 5),
                ellip=rng.uniform(0, 0.7),
                theta=rng.uniform(0, np.pi),
            )  # fmt: skip
        image += model.render(shape, psf=psf)
        positions.append((x, y))
    return image + rng.normal(0, SIGMA, shape), np.array(positions), is_star


@pytest.fixture(scope="module")
def chosen(sky, psf):
    image, positions, _ = sky
    models = {"star": PointSource2D(), "galaxy": SersicGalaxy2D()}
    return deblend(image, positions, model=models, psf=psf, uncertainty=SIGMA)


def test_probabilities_of_stars_mean_what_they_say(sky, chosen):
    p, is_star = chosen.probability[:, 0], sky[2]
    assert np.allclose(chosen.probability.sum(1), 1)
    for low, high in ((0, 0.1), (0.1, 0.9), (0.9, 1.01)):
        some = (p >= low) & (p < high)
        spread = np.sqrt((p[some] * (1 - p[some])).sum())
        assert abs(is_star[some].sum() - p[some].sum()) < 3 * spread + 2
    assert np.mean((p > 0.5) == is_star) > 0.85


def test_each_source_has_the_model_that_it_chose(chosen):
    star = np.array([isinstance(m, PointSource2D) for m in chosen.models])
    assert (star == (chosen.probability[:, 0] > 0.5)).all()
    assert [len(p) for p in chosen.params] == np.where(star, 3, 7).tolist()
    table = chosen.to_table()
    assert np.allclose(table["p_star"], chosen.probability[:, 0])


def test_the_prior_counts(sky, chosen, psf):
    image, positions, _ = sky
    models = {"star": PointSource2D(), "galaxy": SersicGalaxy2D()}
    options = {"model": models, "psf": psf, "uncertainty": SIGMA}
    few = deblend(image[:60], positions[:24], model_prior={"star": 0.01, "galaxy": 0.99}, **options)
    ratio = np.log(few.probability[:, 0] / few.probability[:, 1])
    expected = few.log_evidence[:, 0] - few.log_evidence[:, 1] + np.log(0.01 / 0.99)
    assert np.allclose(ratio, expected)


def test_bright_stars_are_stars_though_the_psf_is_not_quite_theirs(psf):
    y, x = np.mgrid[-12:13, -12:13]
    wider = PSF(np.exp(-(x**2 + y**2) / (2 * (1.03 * FWHM / 2.3548) ** 2)))
    image = PointSource2D(30_000, 20, 20).render((41, 41), psf=wider)
    image += SersicGalaxy2D(30_000, 55, 20, r_eff=2.5).render((41, 76), psf=wider)[:, :41] * 0
    image += np.random.default_rng(2).normal(0, SIGMA, image.shape)
    models = {"star": PointSource2D(), "galaxy": SersicGalaxy2D()}
    result = deblend(image, [(20, 20)], model=models, psf=psf, uncertainty=SIGMA)
    assert result.probability[0, 0] > 0.5


def test_structure_is_learned_and_a_profile_is_a_profile(psf):
    rng = np.random.default_rng(3)
    learned = LearnedGalaxy2D.from_pretrained()
    params = learned.sample(1, rng)
    params[:, :5] = [[6000, 30, 32, 7, 0.4]]
    image = learned.render((64, 128), params=params, psf=psf)[0]
    image += SersicGalaxy2D(6000, 96, 32, r_eff=7, n=1.5, ellip=0.4, theta=1).render(
        (64, 128), psf=psf
    )
    image += rng.normal(0, SIGMA, image.shape)
    models = {"sersic": SersicGalaxy2D(), "learned": learned}
    result = deblend(image, [(30, 32), (96, 32)], model=models, psf=psf, uncertainty=SIGMA)
    assert [type(m).__name__ for m in result.models] == ["LearnedGalaxy2D", "SersicGalaxy2D"]


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"model": {}}, "no model"),
        ({"model": {"a": 3}}, "mapping of names"),
        ({"model": SersicGalaxy2D(), "model_prior": {"a": 1}}, "needs a mapping"),
        ({"model": {"a": SersicGalaxy2D()}, "model_prior": {"b": 1}}, "must name a"),
        ({"model": {"a": SersicGalaxy2D()}, "model_prior": {"a": -1}}, "probabilities"),
        ({"model": {"a": SersicGalaxy2D()}, "psf_error": 1.5}, "psf_error"),
        ({"model": SersicGalaxy2D(), "workers": 0}, "workers"),
    ],
)
def test_what_makes_no_sense_is_refused(options, error):
    with pytest.raises((TypeError, ValueError), match=error):
        deblend(np.zeros((20, 20)), [(10, 10)], uncertainty=1.0, **options)


def test_a_bulge_and_a_disk_are_told_from_a_profile(psf):
    both = BulgeDiskGalaxy2D(
        20_000, 40, 40, bulge_fraction=0.4, r_bulge=1.5, n_bulge=4, r_disk=10, ellip_disk=0.6,
        theta_disk=0.3,
    )  # fmt: skip
    image = both.render((81, 81), psf=psf)
    image += np.random.default_rng(4).normal(0, SIGMA, image.shape)
    models = {"sersic": SersicGalaxy2D(), "bulge_disk": BulgeDiskGalaxy2D()}
    result = deblend(image, [(40, 40)], model=models, psf=psf, uncertainty=SIGMA)
    assert result.probability[0, 1] > 0.99


# -- stamps, groups and processes ----------------------------------------------------------------


def test_stamps_are_the_data_without_the_others(sky, chosen):
    image, positions, _ = sky
    rows = []
    for some, data, sigma, position in chosen.stamps():
        rows += some.tolist()
        side = data.shape[1]
        for j, k in enumerate(some):
            x, y = np.rint(chosen.params[k][1:3] - position[j]).astype(int)
            where, own = chosen.source_image(k)
            whole = chosen.data - chosen.model_image
            whole[where] += own
            low = (max(y, 0), max(x, 0))
            high = (min(y + side, image.shape[0]), min(x + side, image.shape[1]))
            cut = data[j][low[0] - y : high[0] - y, low[1] - x : high[1] - x]
            assert np.allclose(cut, whole[low[0] : high[0], low[1] : high[1]], atol=1e-4)
            used = sigma[j][low[0] - y : high[0] - y, low[1] - x : high[1] - x]
            assert np.allclose(used, SIGMA)
    assert sorted(rows) == list(range(len(positions)))
    assert [len(r) for r, *_ in chosen.stamps([3])] == [1]


@pytest.fixture(scope="module")
def crowd(psf):
    """A row of sources each of which overlaps the next."""
    rng = np.random.default_rng(8)
    positions = np.array([(15 + 7.0 * k, 40 + rng.uniform(-2, 2)) for k in range(30)])
    flux = rng.uniform(200, 2000, 30)
    image = np.zeros((81, 240))
    for f, (x, y) in zip(flux, positions, strict=True):
        image += SersicGalaxy2D(f, x, y, r_eff=3, n=1.5).render(image.shape, psf=psf)
    return image + rng.normal(0, SIGMA, image.shape), positions, flux


def test_groups_that_overlap_settle(crowd, psf):
    """Were all fitted at once, each with what the others were, they would swing."""
    image, positions, flux = crowd
    result = deblend(
        image, positions, model=SersicGalaxy2D(), psf=psf, uncertainty=SIGMA, max_group=2
    )
    assert len(np.unique(result.group)) > 10
    off = result.residual_image[20:60] / SIGMA
    assert np.mean(off**2) < 1.1
    assert abs(result.flux.sum() / flux.sum() - 1) < 0.02


def test_several_processes_find_the_same(crowd, psf):
    image, positions, _ = crowd
    options = {"model": SersicGalaxy2D(), "psf": psf, "uncertainty": SIGMA, "max_group": 3}
    one = deblend(image, positions, **options)
    two = deblend(image, positions, workers=2, **options)
    assert np.array_equal(one.params, two.params)
    assert np.array_equal(one.flags, two.flags)


def test_a_job_that_was_stopped_goes_on(crowd, psf, tmp_path):
    image, positions, _ = crowd
    options = {"model": SersicGalaxy2D(), "psf": psf, "uncertainty": SIGMA, "max_group": 2}
    whole = deblend(image, positions, **options)
    file = tmp_path / "fits.checkpoint"

    def stop(done: int, total: int) -> None:
        if done > 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        deblend(image, positions, checkpoint=file, progress=stop, **options)
    size = file.stat().st_size
    assert size > 10_000
    again = deblend(image, positions, checkpoint=file, **options)
    assert file.stat().st_size > size
    assert np.array_equal(again.params, whole.params)
    assert np.array_equal(again.flux_cov, whole.flux_cov)
    assert np.allclose(again.model_image, whole.model_image)
    other = {**options, "model": SersicGalaxy2D(n=1, fixed={"n": True})}
    held = deblend(image, positions, checkpoint=file, **other)  # other fits: none is taken over
    assert (held.params[:, 4] == 1).all()


def test_a_position_without_light_spoils_no_other(psf):
    rng = np.random.default_rng(6)
    light = SersicGalaxy2D(800, 18, 20, r_eff=3).render((41, 41), psf=psf)
    images = light + rng.normal(0, SIGMA, (10, 41, 41))
    empty = np.array([(18, 20), (30, 24)])
    results = deblend(images, [empty] * 10, model=SersicGalaxy2D(), psf=psf, uncertainty=SIGMA)
    assert all(r.flux[1] >= 0 for r in results)
    dark = [r for r in results if r.flux[1] == 0]
    assert dark
    for result in dark:
        assert np.isfinite(result.flux_err).all()
        assert abs(result.flux[0] - 800) < 5 * result.flux_err[0]


def test_a_checkpoint_is_of_one_network(psf, tmp_path):
    image = SersicGalaxy2D(2000, 20, 20, r_eff=3).render((41, 41), psf=psf)
    image += np.random.default_rng(9).normal(0, SIGMA, image.shape)
    file, own = tmp_path / "fits.checkpoint", LearnedGalaxy2D.from_pretrained()
    options = {"psf": psf, "uncertainty": SIGMA, "checkpoint": file}
    first = deblend(image, [(20, 20)], model=own, **options)
    size = file.stat().st_size
    again = deblend(image, [(20, 20)], model=LearnedGalaxy2D.from_pretrained(), **options)
    assert file.stat().st_size == size  # nothing was fitted
    assert np.array_equal(again.params, first.params)
    other = pickle.loads(pickle.dumps(own.shape.vae))
    with torch.no_grad():
        next(iter(other.decoder.parameters())).mul_(1.05)
    deblend(image, [(20, 20)], model=LearnedGalaxy2D(shape=LearnedShape(other)), **options)
    assert file.stat().st_size > size
