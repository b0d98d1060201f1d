"""Figures: what they show, what they return, and that they survive bad galaxies."""

import subprocess
import sys

import astropy.units as u
import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.colors import AsinhNorm
from matplotlib.patches import Ellipse
from numpy.testing import assert_allclose

from galmorph import FitFlag, plot, profiles
from galmorph.plot import labels

SKY = 50.0
NAMES = ("flux", "x_0", "y_0", "r_eff", "ellip", "theta")


class Gaussian2D:
    """Stands in for the model: only its name is shown."""


class Result:
    """The part of a `FitResult` that figures use, for elliptical Gaussians on a constant sky.

    The last galaxy has a masked corner, and those in ``failed`` have no fit.
    """

    param_names = NAMES
    model = Gaussian2D()

    def __init__(self, shapes=((24, 30),), *, failed=(), unit=None, rng=None, wrong=1.0):
        rng = np.random.default_rng(5) if rng is None else rng
        n = len(shapes)
        self.data_unit = unit
        self.ids = 7 + np.arange(n)
        self.origin = np.array([(100 + 10 * i, 200) for i in range(n)])
        self.params = np.full((n, len(NAMES)), np.nan)
        self.cov = np.full((n, len(NAMES), len(NAMES)), np.nan)
        self.background = np.full((n, 1), np.nan)
        self.chi2 = np.full(n, np.nan)
        self.dof = np.array([ny * nx for ny, nx in shapes])
        self.flags = np.zeros(n, dtype=int)
        self._stamps = []
        for i, (ny, nx) in enumerate(shapes):
            center = (nx - 1) / 2 + 0.3, (ny - 1) / 2 - 0.2
            a = profiles.elliptical_radius((ny, nx), *center, 0.4, 0.5)
            truth = 900 * np.exp(-0.5 * (a / 3) ** 2)
            data = truth + SKY + rng.normal(0, 2, (ny, nx))
            inv_sigma = np.full((ny, nx), 0.5)
            if i == n - 1:
                data[:3, :4], inv_sigma[:3, :4] = 0, 0
            model = truth * wrong + SKY
            if i in failed:
                model = np.full((ny, nx), np.nan)
                self.flags[i] = FitFlag.BAD_PSF
            else:
                self.params[i] = 3e4, *(center + self.origin[i]), 3.5, 0.4, 0.5
                errors = np.array([100, 0.02, 0.02, 0.05, 0.0, 0.01])  # ellip is fixed
                self.cov[i] = np.diag(errors**2)
                self.cov[i, 0, 3] = self.cov[i, 3, 0] = 0.6 * 100 * 0.05
                self.background[i] = SKY
                self.chi2[i] = np.sum(((data - model) * inv_sigma) ** 2)
            self._stamps.append((data, inv_sigma, model))

    def __len__(self):
        return len(self.params)

    def stamp(self, i):
        return self._stamps[i]


@pytest.fixture(autouse=True)
def _draw_and_close():
    """Draw every figure, for errors that show only then."""
    yield
    for number in plt.get_fignums():
        plt.figure(number).canvas.draw()
    plt.close("all")


def image(ax):
    return np.ma.masked_array(ax.images[0].get_array())


class TestFit:
    def test_panels(self):
        result = Result(unit=u.ct)
        axes = plot.fit(result)
        data, inv_sigma, model = result.stamp(0)
        used = inv_sigma > 0
        assert axes.shape == (3,)
        assert_allclose(image(axes[0]).compressed(), data[used] - SKY)
        assert_allclose(image(axes[1]), model - SKY)
        assert_allclose(image(axes[2]).compressed(), ((data - model) * inv_sigma)[used])
        assert [ax.get_title() for ax in axes] == ["Data − background", "Gaussian2D", "Residual"]

    def test_pixels_of_the_parent_image(self):
        for ax in plot.fit(Result()):
            assert tuple(ax.images[0].get_extent()) == (99.5, 129.5, 199.5, 223.5)
            assert ax.get_xlim() == (99.5, 129.5)
            assert ax.get_ylim() == (199.5, 223.5)

    def test_colors(self):
        data, model, residual = (ax.images[0] for ax in plot.fit(Result(), residual_limit=4))
        assert isinstance(data.norm, AsinhNorm)
        assert (data.norm.vmin, data.norm.vmax) == (model.norm.vmin, model.norm.vmax)
        assert (residual.norm.vmin, residual.norm.vmax) == (-4, 4)
        assert data.cmap.name == model.cmap.name == "viridis"

    def test_color_bars_have_units(self):
        figure = plot.fit(Result(unit=u.ct))[0].figure
        bars = [ax.get_ylabel() for ax in figure.axes[3:]]
        assert sorted(bars) == ["Brightness [$\\mathrm{ct}$]", "Residual [σ]"]

    def test_unused_pixels_are_marked(self):
        axes = plot.fit(Result())
        for ax in axes[[0, 2]]:
            assert image(ax).mask.sum() == 12
            (hatched,) = (patch for patch in ax.patches if patch.get_hatch())
            box = hatched.get_path().get_extents()
            assert_allclose([box.x0, box.x1, box.y0, box.y1], [99.5, 103.5, 199.5, 202.5])
        assert not np.ma.is_masked(image(axes[1]))

    def test_half_light_ellipse(self):
        result = Result()
        for ax in plot.fit(result):
            (ellipse,) = (patch for patch in ax.patches if isinstance(patch, Ellipse))
            assert_allclose(ellipse.center, result.params[0, 1:3])
            assert_allclose([ellipse.width, ellipse.height], [7, 4.2])
            assert_allclose(ellipse.angle, np.degrees(0.5))

    def test_title_has_chi2_and_flags(self):
        result = Result([(20, 20)] * 3)
        result.flags[2] = FitFlag.AT_BOUND | FitFlag.POOR_FIT
        text = plot.fit(result, -1)[0].figure.get_suptitle()
        assert "Galaxy 9" in text
        assert f"χ²/dof = {result.chi2[2] / result.dof[2]:.2f}" in text
        assert "at bound, poor fit" in text

    def test_failed_galaxy_shows_its_data(self):
        axes = plot.fit(Result(failed=[0]))
        assert axes[0].get_title() == "Data − median"
        assert image(axes[0]).count() == 24 * 30 - 12
        for ax in axes[1:]:
            assert not ax.images
            assert ax.texts[0].get_text() == "no fit"
        assert "bad psf" in axes[0].figure.get_suptitle()

    def test_no_usable_pixel(self):
        result = Result(failed=[0])
        data, inv_sigma, model = result.stamp(0)
        result._stamps[0] = np.full_like(data, np.nan), 0 * inv_sigma, model
        assert image(plot.fit(result)[0]).mask.all()

    @pytest.mark.parametrize("shape", [(1, 1), (1, 9), (70, 12)])
    def test_odd_shapes(self, shape):
        assert image(plot.fit(Result([shape]))[1]).shape == shape

    def test_constant_stamp(self):
        result = Result(failed=[0])
        result._stamps[0] = (np.ones((5, 5)), np.ones((5, 5)), np.full((5, 5), np.nan))
        plot.fit(result)

    def test_no_background_far_from_zero(self):
        result = Result()
        result.background = np.zeros((1, 0))
        axes = plot.fit(result)
        assert axes[0].get_title() == "Data"
        assert_allclose(image(axes[1]), result.stamp(0)[2])

    def test_tilted_background(self):
        result = Result([(5, 7)])
        result.background = np.array([[SKY, 1.0, 2.0]])
        data, inv_sigma, model = result.stamp(0)
        y, x = np.indices((5, 7))
        plane = (x - 3) + 2 * (y - 2)
        result._stamps[0] = data + plane, inv_sigma, model + plane
        assert_allclose(image(plot.fit(result)[1]), model - SKY)

    def test_given_axes(self):
        _, given = plt.subplots(1, 3)
        axes = plot.fit(Result(), axes=given)
        assert list(axes) == list(given)
        assert "χ²/dof" in axes[2].get_title()

    @pytest.mark.parametrize("limit", [0, -1, np.nan])
    def test_bad_limit(self, limit):
        with pytest.raises(ValueError, match="residual_limit"):
            plot.fit(Result(), residual_limit=limit)

    def test_bad_axes(self):
        with pytest.raises(ValueError, match="three axes"):
            plot.fit(Result(), axes=plt.subplots(1, 2)[1])

    @pytest.mark.parametrize("i", [1, -2])
    def test_out_of_range(self, i):
        with pytest.raises(IndexError, match="out of range"):
            plot.fit(Result(), i)


class TestEllipses:
    """Every model's ellipses come from the names of its parameters."""

    @staticmethod
    def ellipses(names, values):
        result = Result()
        result.param_names, result.params = names, np.array([values])
        axes = plot.fit(result)
        found = [patch for patch in axes[0].patches if isinstance(patch, Ellipse)]
        return [(patch.width / 2, patch.height / 2) for patch in found], axes[0].lines

    def test_bulge_and_disk(self):
        names = ("flux", "x_0", "y_0", "bulge_fraction", "r_bulge", "n_bulge", "ellip_bulge")
        names += ("theta_bulge", "r_disk", "ellip_disk", "theta_disk")
        values = [1, 110, 210, 0.3, 2, 4, 0.0, 0, 6, 0.5, 0]
        assert_allclose(self.ellipses(names, values)[0], [(6, 3), (2, 2)])

    def test_learned(self):
        names = ("flux", "x_0", "y_0", "r_50", "theta", "z0")
        assert_allclose(self.ellipses(names, [1, 110, 210, 4, 0.2, 0])[0], [(4, 4)])

    def test_point(self):
        found, lines = self.ellipses(("flux", "x_0", "y_0"), [1, 110, 210])
        assert not found
        assert (lines[0].get_xdata()[0], lines[0].get_ydata()[0]) == (110, 210)

    def test_larger_than_the_stamp_does_not_zoom_out(self):
        result = Result()
        result.params[0, 3] = 500
        assert plot.fit(result)[0].get_xlim() == (99.5, 129.5)


class TestCompareFits:
    def test_aligned_rows(self):
        results = {"A": Result(), "B": Result(wrong=0.9)}
        axes = plot.compare_fits(results)
        assert axes.shape == (2, 3)
        assert [ax.get_title() for ax in axes[0]] == ["Data − background", "A", "B"]
        for column, result in enumerate(results.values(), start=1):
            data, inv_sigma, model = result.stamp(0)
            used = inv_sigma > 0
            assert_allclose(image(axes[0, column]), model - SKY)
            residual = ((data - model) * inv_sigma)[used]
            assert_allclose(image(axes[1, column]).compressed(), residual)
            assert "χ²/dof" in axes[1, column].get_title()
        norms = [ax.images[0].norm for ax in axes[0]]
        assert len({(norm.vmin, norm.vmax) for norm in norms}) == 1

    def test_one_failed(self):
        axes = plot.compare_fits({"A": Result(failed=[0]), "B": Result()})
        assert axes[0, 0].get_title() == "Data − background"
        assert not axes[0, 1].images
        assert axes[0, 2].images

    def test_all_failed(self):
        axes = plot.compare_fits({"A": Result(failed=[0])})
        assert axes[0, 0].get_title() == "Data − median"

    def test_refuses_other_stamps(self):
        with pytest.raises(ValueError, match="different stamps"):
            plot.compare_fits({"A": Result(), "B": Result([(9, 9)])})
        with pytest.raises(ValueError, match="different numbers"):
            plot.compare_fits({"A": Result(), "B": Result([(24, 30)] * 2)})
        with pytest.raises(ValueError, match="empty"):
            plot.compare_fits({})
        with pytest.raises(ValueError, match="shape"):
            plot.compare_fits({"A": Result()}, axes=plt.subplots(2, 3)[1])


class TestRadialProfile:
    def test_one_model(self):
        result = Result(unit=u.ct)
        axes = plot.radial_profile(result)
        assert axes.shape == (2,)
        assert axes[0].get_ylabel() == "Surface brightness [$\\mathrm{ct}$ / pixel]"
        assert axes[1].get_xlabel() == "Semi-major axis [pixel]"
        bars = axes[0].containers[0]
        data, inv_sigma, _ = result.stamp(0)
        center = result.params[0, 1:3] - result.origin[0]
        expected = profiles.radial_profile(data - SKY, inv_sigma, *center, 0.4, 0.5)
        assert_allclose(bars.lines[0].get_xdata(), expected.a)
        assert_allclose(bars.lines[0].get_ydata(), expected.mean)

    def test_residual_is_in_sigma(self):
        _, ax = plot.radial_profile(Result())
        sigmas = ax.lines[0].get_ydata()
        assert 0.5 < np.std(sigmas) < 1.5
        low, high = ax.get_ylim()
        assert low == -high
        assert high >= 3

    def test_negative_means_need_symlog(self):
        assert plot.radial_profile(Result([(60, 60)]))[0].get_yscale() == "symlog"

    def test_positive_means_are_logarithmic(self):
        result = Result()
        result.background[:] = 0
        assert plot.radial_profile(result)[0].get_yscale() == "log"

    def test_several_models(self):
        axes = plot.radial_profile({"A": Result(), "B": Result(wrong=0.9), "C": Result(failed=[0])})
        texts = [text.get_text() for text in axes[0].get_legend().get_texts()]
        assert texts[0] == "Data"
        assert [text.partition(",")[0] for text in texts] == ["Data", "A", "B", "half-light radius"]

    def test_half_light_radius(self):
        ax, _ = plot.radial_profile(Result())
        (line,) = (line for line in ax.lines if line.get_linestyle() == ":")
        assert line.get_xdata()[0] == 3.5

    def test_failed_galaxy_shows_its_data(self):
        axes = plot.radial_profile(Result(failed=[0]))
        assert "no fit" in axes[0].get_title()
        assert len(axes[0].containers[0].lines[0].get_xdata()) > 5

    def test_no_usable_pixel(self):
        result = Result(failed=[0])
        data, inv_sigma, model = result.stamp(0)
        result._stamps[0] = data, 0 * inv_sigma, model
        assert plot.radial_profile(result)[0].texts[0].get_text() == "no usable pixels"

    def test_given_axes(self):
        _, one = plt.subplots()
        assert list(plot.radial_profile(Result(), ax=one)) == [one]
        _, two = plt.subplots(2)
        assert list(plot.radial_profile(Result(), ax=two)) == list(two)
        with pytest.raises(ValueError, match="one axes or two"):
            plot.radial_profile(Result(), ax=plt.subplots(3)[1])

    @pytest.mark.parametrize(
        ("unit", "label"),
        [
            (None, "Surface brightness [1 / pixel]"),
            (u.MJy / u.sr, r"Surface brightness [$\mathrm{MJy\,sr^{-1}}$]"),
            (u.dimensionless_unscaled, "Surface brightness [1 / pixel]"),
        ],
    )
    def test_units(self, unit, label):
        assert plot.radial_profile(Result(unit=unit))[0].get_ylabel() == label


class TestCorner:
    def test_fixed_parameters_are_left_out(self):
        figure = plot.corner(Result(unit=u.ct))
        assert len(figure.axes) == 5 * 6 / 2
        titles = [ax.get_title() for ax in figure.axes if ax.get_title()]
        assert titles[0] == "$F$ [$\\mathrm{ct}$]\n30000 ± 100"
        assert not any("epsilon" in title for title in titles)
        assert titles[-1] == f"$\\theta$ [deg]\n{np.degrees(0.5):.2f} ± 0.57"

    def test_shadow_of_the_ellipses_is_sigma(self):
        figure = plot.corner(Result(), params=["flux", "r_eff"])
        joint = figure.axes[1]
        two_sigma, one_sigma = joint.lines[:2]
        for sigmas, line in ((1, one_sigma), (2, two_sigma)):
            x, y = line.get_data()
            assert_allclose([np.ptp(x) / 200, np.ptp(y) / 0.1], sigmas, rtol=1e-3)
        # All of a 1 sigma ellipse is at Mahalanobis distance 1.
        offset = np.stack(one_sigma.get_data()) - np.array([[3e4], [3.5]])
        cov = Result().cov[0][np.ix_([0, 3], [0, 3])]
        distance = np.einsum("in,ij,jn->n", offset, np.linalg.inv(cov), offset)
        assert_allclose(distance, 1, rtol=1e-6)

    def test_large_and_small_numbers_move_to_the_unit(self):
        result = Result()
        result.params[0, 0] *= 1e-20
        result.cov[0, 0, :] *= 1e-20
        result.cov[0, :, 0] *= 1e-20
        figure = plot.corner(result, params=["flux"])
        assert figure.axes[0].get_title() == "$F$ [$10^{-18}$]\n300.0 ± 1.0"

    @pytest.mark.parametrize("params", [None, [], ["ellip"]])
    def test_nothing_to_draw(self, params):
        result = Result(failed=[0] if params is None else [])
        figure = plot.corner(result, params=params)
        assert "no covariance" in figure.axes[0].texts[0].get_text()

    def test_given_figure(self):
        figure = plt.figure()
        assert plot.corner(Result(), fig=figure) is figure

    def test_unknown_parameter(self):
        with pytest.raises(ValueError, match="no parameters named"):
            plot.corner(Result(), params=["mass"])


class TestContactSheet:
    def test_mixed_shapes_and_failures(self):
        result = Result([(24, 30), (12, 50), (40, 9), (1, 1)], failed=[1], unit=u.ct)
        figure = plot.contact_sheet(result)
        assert [len(ax.images) for ax in figure.axes[:4]] == [3, 1, 3, 3]
        assert figure.axes[4].get_xlabel() == "Residual [σ]"
        texts = [text.get_text() for text in figure.axes[1].texts]
        assert texts.count("no fit") == 2
        assert "bad psf" in texts

    def test_thumbnails_keep_their_aspect(self):
        figure = plot.contact_sheet(Result([(10, 40)]))
        left, right, bottom, top = figure.axes[0].images[0].get_extent()
        assert_allclose((right - left) / (top - bottom), 4)
        box = figure.axes[0].get_window_extent()
        limits = np.diff(figure.axes[0].get_xlim()), np.diff(figure.axes[0].get_ylim())
        assert_allclose(box.width / limits[0], box.height / limits[1], rtol=1e-6)

    def test_labels(self):
        result = Result([(20, 20)] * 2, unit=u.nJy)
        figure = plot.contact_sheet(result, [1])
        texts = [text.get_text() for text in figure.axes[0].texts]
        assert "8" in texts
        magnitude = -2.5 * np.log10(3e4) + 31.4
        assert any(f"= {magnitude:.2f}" in text and "S/N = 300" in text for text in texts)

    def test_several_models(self):
        figure = plot.contact_sheet({"A": Result(), "B": Result(failed=[0])})
        assert len(figure.axes[0].images) == 3
        assert {"data", "A", "B", "residual"} <= {t.get_text() for t in figure.axes[0].texts}

    def test_at_most(self):
        result = Result([(9, 9)] * 5)
        figure = plot.contact_sheet(result, max_galaxies=2, ncols=1)
        assert len(figure.axes) == 3
        assert figure.texts[0].get_text() == "3 more not shown"

    @pytest.mark.parametrize(
        "options",
        [{"indices": []}, {"ncols": 0}, {"max_galaxies": 0}, {"residual_limit": 0}],
    )
    def test_bad_options(self, options):
        with pytest.raises(ValueError):
            plot.contact_sheet(Result(), **options)

    def test_out_of_range(self):
        with pytest.raises(IndexError):
            plot.contact_sheet(Result(), [3])


class TestLabels:
    @pytest.mark.parametrize(
        ("name", "symbol"),
        [
            ("r_eff", r"$r_{\mathrm{e}}$"),
            ("r_50", "$r_{50}$"),
            ("z12", "$z_{12}$"),
            ("theta_disk", r"$\theta_{\mathrm{disk}}$"),
            ("bulge_fraction", "$B/T$"),
            ("something_else", "something_else"),
        ],
    )
    def test_symbols(self, name, symbol):
        assert labels.parameter_symbol(name) == symbol

    @pytest.mark.parametrize(
        ("value", "error", "text"),
        [
            (1.0, 0.0999, "1.00 ± 0.10"),
            (-12.3456, 1.54, "−12.3 ± 1.5"),
            (123456.0, 2345.0, "123500 ± 2300"),
            (2.5, 0.0, "2.5"),
            (2.5, np.nan, "2.5"),
        ],
    )
    def test_values(self, value, error, text):
        assert labels.value_text(value, error) == text


class TestProfile:
    def test_gaussian_closed_form(self):
        q, theta, s = 0.5, 0.7, 12.0
        shape, center = (161, 151), (74.3, 80.6)
        radius = profiles.elliptical_radius(shape, *center, 1 - q, theta)
        data = np.exp(-0.5 * (radius / s) ** 2)
        edges = np.array([0.0, 8, 12, 16, 24, 32])
        found = profiles.radial_profile(
            data, np.full(shape, 4.0), *center, 1 - q, theta, edges=edges
        )
        # The integral of the Gaussian over the annulus, over the annulus' area pi q (b^2 - a^2).
        falls = np.exp(-0.5 * (edges / s) ** 2)
        expected = 2 * s**2 * -np.diff(falls) / np.diff(edges**2)
        assert_allclose(found.mean, expected, rtol=0.02)
        assert_allclose(found.n, np.pi * q * np.diff(edges**2), rtol=0.05)
        assert_allclose(found.err, 0.25 / np.sqrt(found.n))

    def test_unused_pixels_do_not_count(self, rng):
        data = rng.normal(5, 1, (30, 30))
        inv_sigma = np.ones((30, 30))
        bad = rng.random((30, 30)) < 0.3
        clean = np.where(bad, np.nan, data)
        reference = profiles.radial_profile(clean, inv_sigma, 14, 15)
        data[bad] = 1e9
        masked = profiles.radial_profile(data, np.where(bad, 0, inv_sigma), 14, 15)
        for got, expected in zip(masked, reference, strict=True):
            assert_allclose(got, expected)
        assert masked.n.sum() == (~bad).sum()

    def test_mean_is_calibrated(self, rng):
        sigma = rng.uniform(0.5, 2, (80, 80))
        found = profiles.radial_profile(rng.normal(0, sigma), 1 / sigma, 40, 40, 0.3, 1.0)
        assert 0.6 < np.mean((found.mean / found.err) ** 2) < 1.5

    def test_nothing_used(self):
        found = profiles.radial_profile(np.ones((4, 4)), np.zeros((4, 4)), 1, 1)
        assert all(len(values) == 0 for values in found)

    def test_center_outside(self):
        found = profiles.radial_profile(np.ones((4, 4)), np.ones((4, 4)), -20, 50)
        assert found.n.sum() == 16

    @pytest.mark.parametrize(
        "bad",
        [
            {"x_0": np.nan},
            {"ellip": 1.0},
            {"ellip": -0.1},
            {"ellip": np.nan},
            {"theta": np.inf},
            {"edges": [0, 2, 1]},
            {"edges": [1]},
            {"data": np.ones(4)},
            {"inv_sigma": np.ones((4, 5))},
        ],
    )
    def test_bad_input(self, bad):
        good = {"data": np.ones((4, 4)), "inv_sigma": np.ones((4, 4)), "x_0": 1, "y_0": 1}
        with pytest.raises(ValueError):
            profiles.radial_profile(**{**good, **bad})


def test_import_leaves_matplotlib_alone():
    code = "import sys, galmorph.plot; sys.exit('matplotlib' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_vector_output(tmp_path):
    plot.fit(Result())[0].figure.savefig(tmp_path / "fit.pdf")
    assert (tmp_path / "fit.pdf").stat().st_size > 1000


def test_real_results(rng):
    pytest.importorskip("galmorph.fitting")
    from galmorph import GaussianGalaxy2D, SersicGalaxy2D, fit_images

    truth = SersicGalaxy2D(flux=2000, x_0=15, y_0=16, r_eff=4, n=1.5, ellip=0.3, theta=0.4)
    images = truth.render((32, 32)) + rng.normal(10, 1, (3, 32, 32))
    images[1] = np.nan
    images[2, :6, :6] = np.nan
    results = {
        "Gaussian": fit_images(images, GaussianGalaxy2D(), uncertainty=1.0, background="constant"),
        "Sérsic": fit_images(images, SersicGalaxy2D(), uncertainty=1.0, background="constant"),
    }
    for i in range(3):
        axes = plot.fit(results["Sérsic"], i)
        assert bool(axes[1].images) == (i != 1)
        plot.compare_fits(results, i)
        plot.radial_profile(results, i)
        plot.corner(results["Sérsic"], i)
    assert len(plot.contact_sheet(results).axes) == 4
    # The model includes the background, which figures take off again.
    residual = plot.fit(results["Sérsic"])[2].images[0].get_array()
    assert abs(np.mean(residual)) < 0.2
