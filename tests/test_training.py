"""Training on stamps: what is read, what is learned, and what is kept when a run is stopped."""

import os
import signal
import socket
import subprocess
import sys
import threading

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from astropy.io import fits
from astropy.nddata import InverseVariance, NDData, StdDevUncertainty
from numpy.testing import assert_allclose, assert_array_equal

from galmorph import PSF, plot
from galmorph.cli import main
from galmorph.training import Augmentation, StampDataset, TrainingBatch, read_log, stream, train
from galmorph.training.schedules import beta_per_epoch, learning_rate_factor

SIDE = 12


@pytest.fixture(autouse=True)
def _one_thread():
    """Threads cost more than they help on networks of this size."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class TinyVAE(torch.nn.Module):
    """A linear network of the protocol that `train` asks for.

    ``noisy`` draws its latents; otherwise the loss is a function of the batch.
    """

    def __init__(self, side=SIDE, latents=3, *, noisy=True, dropout=0.0):
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        n = side * side

        def weights(*shape):
            return torch.nn.Parameter(torch.randn(*shape, generator=generator) / n**0.5)

        self.encoder, self.decoder = weights(n, latents), weights(latents, n)
        self.log_sigma = torch.nn.Parameter(torch.full((latents,), -2.0))
        self.mean = torch.nn.Parameter(torch.zeros(n))
        self.dropout = torch.nn.Dropout(dropout)
        self.norm = torch.nn.BatchNorm1d(latents, affine=False, momentum=0.1)
        self.noisy = noisy

    def elbo(self, batch, *, beta=1.0, generator=None):
        x = batch.images.flatten(1)
        weight = torch.ones_like(x) if batch.weight is None else batch.weight.flatten(1)
        mu = self.dropout(x - self.mean) @ self.encoder
        self.norm(mu)  # its running mean is state that a checkpoint must hold
        z = mu
        if self.noisy:
            noise = torch.randn(mu.shape, generator=generator, device=mu.device)
            z = mu + self.log_sigma.exp() * noise
        chi2 = ((x - self.mean - z @ self.decoder) ** 2 * weight**2).sum(1)
        variance = (2 * self.log_sigma).exp()
        kl = 0.5 * (mu**2 + variance - 2 * self.log_sigma - 1).sum(1)
        return {"loss": 0.5 * chi2 + beta * kl, "log_likelihood": -0.5 * chi2, "kl": kl}


def make_stamps(n=60, side=SIDE, seed=1):
    """Round blobs of different brightness and size, with noise of 0.1."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:side, :side] - (side - 1) / 2
    size, flux = rng.uniform(1.5, 3, (2, n, 1, 1))
    images = flux * np.exp(-(x**2 + y**2) / (2 * size**2)) + rng.normal(0, 0.1, (n, side, side))
    return images.astype(np.float32)


OPTIONS = dict(uncertainty=0.1, epochs=4, batch_size=16, learning_rate=0.01, rng=5, progress=False)


def weights_of(vae):
    return {name: tensor.detach().clone() for name, tensor in vae.state_dict().items()}


def assert_same_run(one, other, vae, other_vae):
    """Bit by bit, but for the time that it took."""
    for name in set(one.history) - {"seconds"}:
        assert_array_equal(one.history[name], other.history[name], err_msg=name)
    assert one.best_epoch == other.best_epoch
    assert one.skipped == other.skipped
    theirs = weights_of(other_vae)
    for name, tensor in weights_of(vae).items():
        assert torch.equal(tensor, theirs[name]), name


# -- data sets ---------------------------------------------------------------------------


def write_folder(path, images):
    path.mkdir()
    for i, image in enumerate(images):
        fits.PrimaryHDU(image).writeto(path / f"g{i:03d}.fits")
    return path


def write_hdf5(path, **arrays):
    h5py = pytest.importorskip("h5py")
    with h5py.File(path, "w") as file:
        for name, array in arrays.items():
            file[name] = array
    return path


@pytest.fixture
def stamps():
    return make_stamps(10)


KINDS = ("array", "list", "npy", "folder", "cube", "compressed", "hdf5", "pair", "nddata", "tensor")


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_images(kind, stamps, tmp_path):
    """Every kind gives the same stamps, in any order."""
    if kind == "array":
        images = stamps.astype(">f8")
    elif kind == "list":
        images = list(stamps)
    elif kind == "npy":
        np.save(images := tmp_path / "a.npy", stamps)
    elif kind == "folder":
        images = write_folder(tmp_path / "stamps", stamps)
    elif kind == "cube":
        fits.PrimaryHDU(stamps).writeto(images := tmp_path / "cube.fits")
    elif kind == "compressed":
        hdu = fits.CompImageHDU(stamps, name="IMAGES", tile_shape=(1, SIDE, SIDE),
                                quantize_level=0, compression_type="GZIP_2")  # fmt: skip
        other = fits.ImageHDU(stamps[0], name="OTHER")
        fits.HDUList([fits.PrimaryHDU(), other, hdu]).writeto(tmp_path / "c.fits")
        images = f"{tmp_path}/c.fits[IMAGES]"
    elif kind == "hdf5":
        images = f"{write_hdf5(tmp_path / 'a.h5', a=stamps, b=stamps + 1)}[a]"
    elif kind == "pair":
        images = (write_hdf5(tmp_path / "a.h5", a=stamps, b=stamps + 1), "a")
    elif kind == "nddata":
        images = NDData(stamps)
    else:
        images = torch.from_numpy(stamps)
    with StampDataset(images) as data:
        assert len(data) == 10
        assert data.shape == (SIDE, SIDE)
        batch, skipped = data.batch([7, 0, 3])
    assert_array_equal(batch.images, stamps[[7, 0, 3]])
    assert batch.images.dtype == torch.float32
    assert batch.index.tolist() == [7, 0, 3]
    assert batch.weight is None
    assert batch.psf is None
    assert not batch.noise_known
    assert skipped == {}


@pytest.mark.parametrize("kind", ["array", "folder", "cube", "hdf5", "list"])
def test_kinds_of_companions(kind, stamps, tmp_path):
    """Noise, masks and PSFs come as the images do."""
    sigma = np.full_like(stamps, 0.5)
    sigma[:, 0, 0] = np.nan
    mask = np.zeros(stamps.shape, np.uint8)
    mask[3, 1, 1] = 4
    psf = np.ones((10, 3, 3), np.float32)
    psf[:, 1, 1] = np.arange(10)
    given = {"images": stamps, "uncertainty": sigma, "mask": mask, "psf": psf}
    if kind == "folder":
        given = {name: write_folder(tmp_path / name, array) for name, array in given.items()}
    elif kind == "cube":
        for name, array in given.items():
            fits.PrimaryHDU(array).writeto(tmp_path / f"{name}.fits")
            given[name] = str(tmp_path / f"{name}.fits")
    elif kind == "hdf5":
        path = write_hdf5(tmp_path / "all.h5", **given)
        given = {name: (path, name) for name in given}
    elif kind == "list":
        given = {name: list(array) for name, array in given.items()}
    with StampDataset(**given) as data:
        batch, _ = data.batch([3, 9])
    assert batch.noise_known
    assert batch.weight[0, 0, 0] == batch.weight[0, 1, 1] == 0
    assert batch.weight[1, 1, 1] == 2
    assert batch.images[0, 1, 1] == 0
    assert_allclose(batch.psf[1], psf[9] / psf[9].sum(), rtol=1e-6)


def test_companions_in_the_file(stamps, tmp_path):
    """Uncertainty, mask and PSF that a stamp's own file holds are found."""
    (tmp_path / "s").mkdir()
    for i, image in enumerate(stamps):
        mask = np.zeros(image.shape, np.uint8)
        mask[0, i] = 1
        hdus = [
            fits.PrimaryHDU(),
            fits.ImageHDU(image, name="SCI"),
            fits.ImageHDU(np.full(image.shape, 4.0), name="IVAR"),
            fits.ImageHDU(mask, name="MASK"),
            fits.ImageHDU(np.eye(3), name="PSF"),
        ]
        fits.HDUList(hdus).writeto(tmp_path / "s" / f"{i}.fits")
    batch, _ = StampDataset(tmp_path / "s").batch([0, 1])
    assert batch.noise_known
    assert batch.weight[:, 0, :3].tolist() == [[0, 2, 2], [2, 0, 2]]
    assert_allclose(batch.psf[0].numpy(), np.eye(3) / 3, rtol=1e-6)
    given, _ = StampDataset(tmp_path / "s", uncertainty=0.1, psf=PSF(np.ones((5, 5)))).batch([1])
    assert given.weight[0, 5, 5] == 10
    assert given.psf.shape == (1, 5, 5)


@pytest.mark.parametrize(
    ("uncertainty", "kind"),
    [
        (0.25, "std"),
        (np.full((SIDE, SIDE), 16.0), "ivar"),
        (np.full(10, 0.0625), "var"),
        (StdDevUncertainty(np.full((10, SIDE, SIDE), 0.25)), "std"),
        (InverseVariance(np.full((10, SIDE, SIDE), 16.0)), "std"),
    ],
)
def test_uncertainty(uncertainty, kind, stamps):
    batch, _ = StampDataset(stamps, uncertainty=uncertainty, uncertainty_type=kind).batch([4, 2])
    assert_array_equal(batch.weight, 4)
    assert batch.noise_known


def test_shape(stamps):
    """Stamps are cut or padded about their middle; the padding is masked."""
    cut, _ = StampDataset(stamps, shape=(6, 4)).batch([1])
    assert_array_equal(cut.images[0], stamps[1, 3:9, 4:8])
    padded, _ = StampDataset(stamps, uncertainty=1.0, shape=(16, 16)).batch([1])
    assert_array_equal(padded.images[0, 2:14, 2:14], stamps[1])
    assert padded.weight.sum() == SIDE * SIDE


def test_unusable_stamps(tmp_path, stamps):
    """Damaged files, other shapes and empty stamps are left out, with the reason."""
    folder = write_folder(tmp_path / "s", stamps[:6])
    (folder / "g001.fits").write_bytes(b"not a FITS file")
    (folder / "g002.fits").write_bytes((folder / "g003.fits").read_bytes()[:2900])
    fits.PrimaryHDU(np.ones((5, 5))).writeto(folder / "g004.fits", overwrite=True)
    fits.PrimaryHDU(np.full((SIDE, SIDE), np.nan)).writeto(folder / "g000.fits", overwrite=True)
    data = StampDataset(folder)
    assert data.first == 3
    batch, skipped = data.batch(range(6))
    assert batch.index.tolist() == [3, 5]
    assert set(skipped) == {0, 1, 2, 4}
    assert skipped[0] == "no usable pixels"
    assert "shape (5, 5)" in skipped[4]
    assert "cannot be read" in skipped[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"images": np.ones((4, 4))}, r"images must be stamps \(N, ny, nx\)"),
        ({"images": "nowhere.fits"}, "images: nowhere.fits: no such file"),
        ({"images": []}, "images is empty"),
        ({"images": np.full((3, 4, 4), np.nan)}, "not one of 3 stamps.*no usable pixels"),
        ({"uncertainty": np.ones((3, SIDE, SIDE))}, "uncertainty holds 3 stamps, images holds 10"),
        ({"uncertainty_type": "sigma"}, "uncertainty_type"),
        ({"uncertainty": -1.0}, "not one of 10 stamps"),
        ({"mask": "nowhere.npy"}, "mask: nowhere.npy"),
        ({"shape": (3,)}, "shape must be two"),
        ({"psf": PSF(np.ones((9, 9)), oversampling=3)}, "oversampling=3"),
    ],
)
def test_bad_data(options, message, stamps):
    with pytest.raises((ValueError, OSError), match=message):
        StampDataset(**({"images": stamps} | options))


def test_hdf5_names(tmp_path, stamps):
    path = write_hdf5(tmp_path / "a.h5", a=stamps, b=stamps, sigma=np.ones(10))
    with pytest.raises(ValueError, match=r"holds 2 cubes; say which.*a, b, sigma"):
        StampDataset(path)
    with pytest.raises(ValueError, match="no data set 'c'"):
        StampDataset((path, "c"))
    with StampDataset(f"{path}[a]", uncertainty=f"{path}[sigma]") as data:
        assert data.batch([0])[0].weight[0, 0, 0] == 1


def test_stream_order(stamps):
    chunks = [[1, 2], [], [9], [0, 3, 4]]
    assert [b.index.tolist() for b in stream(StampDataset(stamps), chunks)] == chunks


_STREAMED = """
import os, sys
import numpy as np
from galmorph.training import StampDataset, stream

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

cube = np.load(sys.argv[1], mmap_mode="r")
data = StampDataset(cube, uncertainty=1.0)
list(stream(data, [range(32)] * 3))
before, most = resident(), 0
for batch in stream(data, [range(k, k + 32) for k in range(0, len(cube), 32)]):
    assert len(batch) == 32
    most = max(most, resident())
print(most - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_does_not_grow(tmp_path):
    """A cube of 200 MB on disk is never in memory, not even as pages of the map."""
    side, n = 128, 3200
    cube = np.lib.format.open_memmap(tmp_path / "big.npy", "w+", np.float32, (n, side, side))
    for start in range(0, n, 640):
        cube[start : start + 640] = np.arange(side)
    del cube
    # by itself: after other tests the memory of this process is in pieces, and may grow or not
    run = [sys.executable, "-c", _STREAMED, str(tmp_path / "big.npy")]
    grown = int(subprocess.run(run, check=True, capture_output=True, text=True).stdout)
    assert grown < 20e6


# -- augmentation and schedules ----------------------------------------------------------


def test_augmentation_moves_all_alike():
    """Weight and PSF follow the image, and all eight views occur."""
    pattern = torch.arange(25.0).reshape(5, 5)
    same = pattern.repeat(64, 1, 1)
    batch = TrainingBatch(same, same + 100, same.clone(), torch.arange(64))
    seen = Augmentation()(batch, rng=2)
    assert torch.equal(seen.weight, seen.images + 100)
    assert torch.equal(seen.psf, seen.images)
    assert len({tuple(image.flatten().tolist()) for image in seen.images}) == 8
    assert torch.equal(batch.images, same)
    again = Augmentation()(batch, rng=2)
    assert torch.equal(again.images, seen.images)


def test_augmentation_of_oblong_stamps():
    batch = TrainingBatch(torch.arange(24.0).reshape(1, 4, 6).repeat(40, 1, 1))
    seen = Augmentation()(batch, rng=1)
    assert seen.images.shape == (40, 4, 6)
    assert len({tuple(image.flatten().tolist()) for image in seen.images}) == 4


def test_shifts():
    """What comes in at the edge is masked."""
    images = torch.arange(1.0, 26).reshape(1, 5, 5)
    seen = Augmentation(turns=False, flips=False, shift=2)(TrainingBatch(images), rng=4)
    dy, dx = Augmentation(turns=False, flips=False, shift=2).draw(1, 4).shifts[0]
    assert (dy, dx) != (0, 0)
    for y in range(5):
        for x in range(5):
            inside = 0 <= y - dy < 5 and 0 <= x - dx < 5
            assert seen.images[0, y, x] == (images[0, y - dy, x - dx] if inside else 0)
            assert seen.weight[0, y, x] == inside
    with pytest.raises(ValueError, match="shift"):
        Augmentation(shift=-1)


def test_schedules():
    factors = [learning_rate_factor(i, 100, schedule="cosine", warmup=10) for i in range(100)]
    assert_allclose(factors[:10], np.arange(1, 11) / 10)
    assert np.all(np.diff(factors[10:]) < 0)
    assert 0 < factors[-1] < 0.01
    assert learning_rate_factor(99, 100, schedule="constant") == 1
    with pytest.raises(ValueError, match="'step'"):
        learning_rate_factor(0, 1, schedule="step")
    with pytest.raises(ValueError, match="2 values for 3 epochs"):
        beta_per_epoch([1, 2], 3)


# -- the loop ----------------------------------------------------------------------------


def test_learns_and_keeps_the_best(stamps):
    vae = TinyVAE()
    result = train(vae, make_stamps(), **OPTIONS | {"epochs": 12})
    history = result.history
    assert history["epoch"].tolist() == list(range(1, 13))
    assert history["loss"][-1] < 0.2 * history["loss"][0]
    assert result.best_epoch == 1 + np.argmin(history["validation_loss"])
    assert_allclose(history["loss"], history["kl"] - history["log_likelihood"], rtol=1e-4)
    assert (result.n_train, result.n_validation, result.n_skipped) == (54, 6, 0)
    assert np.all(history["seconds"] > 0)
    assert history["learning_rate"][0] == 0.01
    assert not vae.training
    assert "best epoch" in str(result)
    assert result.to_table().colnames == list(history)


def test_repeats_and_leaves_the_global_generator_alone():
    state = torch.get_rng_state()
    one, two, three = TinyVAE(dropout=0.2), TinyVAE(dropout=0.2), TinyVAE(dropout=0.2)
    images = make_stamps()
    results = [train(vae, images, **OPTIONS) for vae in (one, two)]
    assert_same_run(*results, one, two)
    other = train(three, images, **OPTIONS | {"rng": 6})
    assert other.history["loss"][0] != results[0].history["loss"][0]
    assert torch.equal(state, torch.get_rng_state())


def test_masked_pixels_and_bad_stamps_teach_nothing():
    """NaN and masked pixels change nothing; empty stamps are counted."""
    images = make_stamps()
    images[7] = np.nan
    broken, mask = images.copy(), np.zeros(images.shape, bool)
    mask[:, 2, 3], broken[:, 2, 3] = True, 1e30
    broken[9, 4, 4], mask[9, 4, 4] = np.nan, True
    good, bad = TinyVAE(noisy=False), TinyVAE(noisy=False)
    images[mask] = 0
    first = train(good, images, mask=mask, **OPTIONS)
    second = train(bad, broken, mask=mask, **OPTIONS)
    assert_same_run(first, second, good, bad)
    assert first.skipped == {7: "no usable pixels"}
    assert first.n_skipped == 1
    assert "1 stamps skipped" in str(first)


def test_validation_stamps():
    result = train(TinyVAE(), make_stamps(), validation=[3, 4, 5], **OPTIONS)
    assert (result.n_train, result.n_validation) == (57, 3)
    none = train(TinyVAE(), make_stamps(), validation=0, patience=1, **OPTIONS)
    assert none.best_epoch == 4
    assert np.all(np.isnan(none.history["validation_loss"]))
    assert not none.stopped_early


class Overfits(TinyVAE):
    """Its validation loss rises with every step from the third epoch on."""

    steps = 0

    def elbo(self, batch, *, beta=1.0, generator=None):
        found = super().elbo(batch, beta=beta, generator=generator)
        if self.training:
            self.steps += 1
        elif self.steps > 2 * 4:
            found["loss"] = found["loss"] + 1e6 * self.steps
        return found


def test_patience():
    vae = Overfits()
    result = train(vae, make_stamps(), patience=3, **OPTIONS | {"epochs": 40})
    assert result.stopped_early
    assert result.best_epoch == 2
    assert len(result.history["epoch"]) == 5
    assert "stopped early" in str(result)


def test_beta_per_epoch_is_used():
    beta = [0.0, 0.1, 0.2, 0.5]
    result = train(TinyVAE(), make_stamps(), beta=beta, **OPTIONS)
    history = result.history
    assert history["beta"].tolist() == beta
    assert_allclose(history["loss"], beta * history["kl"] - history["log_likelihood"], rtol=1e-4)
    assert_allclose(
        history["validation_loss"],
        0.5 * history["validation_kl"] - history["validation_log_likelihood"],
        rtol=1e-4,
    )


class Explodes(TinyVAE):
    """Not finite in the steps of ``bad``."""

    def __init__(self, bad):
        super().__init__()
        self.bad, self.calls = bad, 0

    def elbo(self, batch, *, beta=1.0, generator=None):
        found = super().elbo(batch, beta=beta, generator=generator)
        if self.training:
            self.calls += 1
            if self.calls in self.bad:
                found["loss"] = found["loss"] * torch.tensor(float("nan"))
        return found


def test_steps_that_are_not_finite_are_skipped():
    vae = Explodes({2, 3, 9})
    result = train(vae, make_stamps(), max_bad_steps=3, **OPTIONS)
    assert result.n_nonfinite == 3
    assert "3 steps skipped" in str(result)
    assert all(torch.isfinite(w).all() for w in weights_of(vae).values())
    assert np.all(np.isfinite(result.history["loss"]))


def test_gives_up_after_many_bad_steps():
    vae = Explodes(set(range(7, 99)))
    with pytest.raises(FloatingPointError, match=r"4 steps in a row \(epoch 3\).*of epoch 2$"):
        train(vae, make_stamps(), max_bad_steps=4, **OPTIONS)
    assert all(torch.isfinite(w).all() for w in weights_of(vae).values())


def test_clipping():
    """A spike in the data moves the weights no further than the bound."""
    images = make_stamps()
    images[20] *= 1e4
    moved = []
    for clip in (None, 2.0):
        vae = TinyVAE()
        before = vae.mean.detach().clone()
        train(vae, images, clip=clip, validation=0, **OPTIONS)
        moved.append(float((vae.mean.detach() - before).norm()))
    assert moved[1] < moved[0]


def test_bfloat16():
    vae = TinyVAE()
    result = train(vae, make_stamps(), precision="bfloat16", **OPTIONS | {"epochs": 8})
    assert result.history["loss"][-1] < result.history["loss"][0]
    assert vae.mean.dtype == torch.float32


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"epochs": 0}, ValueError, "epochs must be at least 1"),
        ({"batch_size": 2.5}, TypeError, "batch_size must be an integer"),
        ({"learning_rate": -1}, ValueError, "learning_rate must be positive"),
        ({"schedule": "step"}, ValueError, "schedule must be one of cosine, constant"),
        ({"precision": "float16"}, ValueError, "precision must be one of"),
        ({"beta": [1, 2]}, ValueError, "beta holds 2 values for 4 epochs"),
        ({"beta": -1}, ValueError, "beta must be finite and not negative"),
        ({"validation": 1.0}, ValueError, "validation must be from 0 to below 1"),
        ({"validation": [99]}, ValueError, "validation names stamps outside"),
        ({"augment": "all"}, TypeError, "augment"),
        ({"clip": 0}, ValueError, "clip must be positive"),
        ({"log": "losses.txt"}, ValueError, "log: the name must end in"),
        ({"device": "toaster"}, ValueError, "device 'toaster'"),
        ({"checkpoint": "no/such/folder/run"}, FileNotFoundError, "no such folder"),
    ],
)
def test_bad_settings(options, error, message):
    with pytest.raises(error, match=message):
        train(TinyVAE(), make_stamps(20), **OPTIONS | options)


def test_needs_an_elbo():
    with pytest.raises(TypeError, match="Linear has none"):
        train(torch.nn.Linear(2, 2), make_stamps(4))


# -- files -------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["csv", "jsonl"])
def test_log(ending, tmp_path):
    path = tmp_path / f"losses.{ending}"
    checkpoint = tmp_path / "run"
    train(TinyVAE(), make_stamps(), log=path, checkpoint=checkpoint, **OPTIONS | {"epochs": 2})
    result = train(TinyVAE(), make_stamps(), log=path, checkpoint=checkpoint, **OPTIONS)
    held = read_log(path)
    assert set(held) == set(result.history)
    for name, values in result.history.items():
        assert_array_equal(held[name], values, err_msg=name)
    path.write_text("nonsense\n1\n")
    with pytest.raises(ValueError, match="not a log"):
        read_log(path)


class Killed(Exception):
    pass


class Stops(TinyVAE):
    """Raises at the ``n``-th call of its loss."""

    def __init__(self, n, error):
        super().__init__(dropout=0.2)
        self.calls, self.n, self.error = 0, n, error

    def elbo(self, batch, *, beta=1.0, generator=None):
        self.calls += 1
        if self.calls == self.n:
            self.error()
        return super().elbo(batch, beta=beta, generator=generator)


def kill():
    raise Killed


def ctrl_c():
    signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("n", [3, 7, 10, 18])
@pytest.mark.parametrize("error", [kill, ctrl_c])
def test_resume_is_exact(n, error, tmp_path):
    """Stopped in a step or a validation, then resumed: as if it had never been stopped."""
    images = make_stamps()
    images[11] = np.nan
    whole = TinyVAE(dropout=0.2)
    expected = train(whole, images, **OPTIONS)
    options = OPTIONS | {"checkpoint": tmp_path / "run"}
    with pytest.raises((Killed, KeyboardInterrupt)):
        train(Stops(n, error), images, **options)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    vae = TinyVAE(dropout=0.2)
    result = train(vae, images, **options)
    assert_same_run(result, expected, vae, whole)
    again = TinyVAE(dropout=0.2)
    assert_same_run(train(again, images, **options), expected, again, whole)
    assert not list(tmp_path.glob("*.new"))


def test_resume_after_sigkill(tmp_path):
    """The process is killed by the system, at no step in particular."""
    code = (
        "import sys\nsys.path.insert(0, sys.argv[1])\n"
        "import torch\ntorch.set_num_threads(1)\n"
        "from test_training import *\n"
        "class Slow(TinyVAE):\n"
        "    def elbo(self, batch, **options):\n"
        "        print(flush=True)\n"
        "        return super().elbo(batch, **options)\n"
        "train(Slow(), make_stamps(), checkpoint=sys.argv[2], checkpoint_minutes=1e-9,\n"
        "      **OPTIONS | {'epochs': 5000})\n"
    )
    here = os.path.dirname(__file__)
    options = OPTIONS | {"epochs": 12}
    # cosine needs the number of epochs: the schedule must be one that does not
    code = code.replace("**OPTIONS", "schedule='constant', **OPTIONS")
    process = subprocess.Popen(
        [sys.executable, "-c", code, here, tmp_path / "run"], stdout=subprocess.PIPE
    )
    for _ in range(29):  # five steps an epoch, one of them to validate
        process.stdout.readline()
    process.kill()
    process.wait()
    process.stdout.close()
    vae, whole = TinyVAE(), TinyVAE()
    result = train(vae, make_stamps(), checkpoint=tmp_path / "run", schedule="constant", **options)
    expected = train(whole, make_stamps(), schedule="constant", **options)
    assert_same_run(result, expected, vae, whole)


def test_interruption_in_another_thread(tmp_path):
    """Signals are the main thread's; training elsewhere works without them."""
    found = []
    worker = threading.Thread(
        target=lambda: found.append(
            train(TinyVAE(), make_stamps(), checkpoint=tmp_path / "run", **OPTIONS)
        )
    )
    worker.start()
    worker.join()
    assert found[0].best_epoch > 0


def test_more_epochs(tmp_path):
    options = OPTIONS | {"schedule": "constant", "checkpoint": tmp_path / "run"}
    train(TinyVAE(), make_stamps(), **options)
    result = train(TinyVAE(), make_stamps(), **options | {"epochs": 6})
    assert len(result.history["epoch"]) == 6


def test_seed_is_in_the_checkpoint(tmp_path):
    """A run without a seed goes on with the one that it has drawn."""
    options = OPTIONS | {"rng": None, "checkpoint": tmp_path / "run"}
    train(TinyVAE(), make_stamps(), **options | {"epochs": 2})
    assert train(TinyVAE(), make_stamps(), **options).history["epoch"].tolist() == [1, 2, 3, 4]


def test_checkpoint_of_another_run(tmp_path):
    path = tmp_path / "run"
    train(TinyVAE(), make_stamps(), checkpoint=path, **OPTIONS)
    for changed, message in [
        ({"learning_rate": 0.02}, "learning_rate was 0.01"),
        ({"rng": 6}, "rng was another"),
        ({"uncertainty": 0.2}, "noise and masks"),
    ]:
        with pytest.raises(ValueError, match=message):
            train(TinyVAE(), make_stamps(), checkpoint=path, **OPTIONS | changed)
    with pytest.raises(ValueError, match="network"):
        train(TinyVAE(latents=4), make_stamps(), checkpoint=path, **OPTIONS)
    with pytest.raises(ValueError, match="first image"):
        train(TinyVAE(), make_stamps(seed=2), checkpoint=path, **OPTIONS)
    train(TinyVAE(latents=4), make_stamps(), checkpoint=path, resume=False, **OPTIONS)


@pytest.mark.parametrize("content", [b"", b"galmorph", "half", "pickle"])
def test_damaged_checkpoint(content, tmp_path):
    path = tmp_path / "run"
    train(TinyVAE(), make_stamps(), checkpoint=path, **OPTIONS | {"epochs": 1})
    if content == "half":
        content = path.read_bytes()[: path.stat().st_size // 2]
    if content == "pickle":
        torch.save(threading.Thread, path)  # code, which is not to be run
    else:
        path.write_bytes(content)
    with pytest.raises(ValueError, match="damaged, or not a checkpoint"):
        train(TinyVAE(), make_stamps(), checkpoint=path, **OPTIONS)


# -- several processes -------------------------------------------------------------------

DDP = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
torch.set_num_threads(1)
from test_training import *
images = make_stamps(61)
images[[4, 30]] = np.nan
vae = TinyVAE(noisy=False)
result = train(vae, images, log=sys.argv[2] + "/log.csv", checkpoint=sys.argv[2] + "/run",
               **OPTIONS | {"epochs": 3})
torch.save([vae.state_dict(), {k: v.tolist() for k, v in result.history.items()},
            sorted(result.skipped)], sys.argv[2] + f"/{os.environ['RANK']}.pt")
"""


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def test_two_processes_agree_with_one(tmp_path):
    """Two gloo processes: the same weights in both, and as one process to rounding."""
    processes, port = [], str(free_port())
    for rank in range(2):
        env = os.environ | {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
        }  # fmt: skip
        command = [sys.executable, "-c", DDP, os.path.dirname(__file__), tmp_path]
        processes.append(subprocess.Popen(command, env=env, stderr=subprocess.PIPE))
    images = make_stamps(61)
    images[[4, 30]] = np.nan
    vae = TinyVAE(noisy=False)
    result = train(vae, images, **OPTIONS | {"epochs": 3})
    for process in processes:
        _, said = process.communicate(timeout=100)
        assert process.returncode == 0, said.decode()
    held = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for name in held[0][0]:
        assert torch.equal(held[0][0][name], held[1][0][name])
    assert held[0][2] == held[1][2] == sorted(result.skipped) == [4, 30]
    for name in ("loss", "validation_loss", "kl"):
        assert_allclose(held[0][1][name], result.history[name], rtol=1e-4)
    for name in ("encoder", "decoder", "mean"):
        assert_allclose(held[0][0][name], weights_of(vae)[name], rtol=1e-3, atol=1e-5)
    assert_allclose(read_log(tmp_path / "log.csv")["loss"], held[0][1]["loss"])


# -- the command line --------------------------------------------------------------------

CONFIG = """
[model]
preset = "regier2015"
options = {hidden = [16], latent_size = 2, scale = 1.0}
[data]
images = "stamps.npy"
uncertainty = 0.1
[training]
epochs = 3
batch_size = 16
seed = 4
[output]
weights = "mine.safetensors"
plot = "losses.png"
licence = "CC0-1.0"
metadata = {survey = "none"}
"""


@pytest.fixture
def config(tmp_path):
    """A configuration, its stamps, and a function that changes the text."""
    np.save(tmp_path / "stamps.npy", np.abs(make_stamps()))
    path = tmp_path / "train.toml"

    def write(old="", new=""):
        assert old in CONFIG
        path.write_text(CONFIG.replace(old, new) if old else CONFIG + new)
        return str(path)

    write()
    return write


def test_train_command(config, tmp_path, capsys):
    """Weights, curves and plot are written; the weights say where they come from."""
    from galmorph.nets import GalaxyVAE

    assert main(["train", config()]) == 0
    said = capsys.readouterr()
    assert "best epoch" in said.out
    assert "mine.safetensors" in said.out
    vae = GalaxyVAE.read(tmp_path / "mine.safetensors")
    assert vae.config["options"]["image_shape"] == [SIDE, SIDE]
    assert vae.metadata["training_data"] == "stamps.npy"
    assert vae.metadata["training_data_hash"].startswith("sha256:")
    assert vae.metadata["licence"] == "CC0-1.0"
    assert vae.metadata["survey"] == "none"
    assert vae.metadata["training"]["stamps"] == 54
    assert read_log(tmp_path / "mine.csv")["epoch"].tolist() == [1, 2, 3]
    assert (tmp_path / "losses.png").stat().st_size > 1000
    assert not (tmp_path / "mine.safetensors.checkpoint").exists()

    assert main(["train", config()]) == 2
    assert "output.weights" in capsys.readouterr().err
    assert main(["train", config(), "--overwrite", "--quiet"]) == 0
    said = capsys.readouterr()
    assert said.out + said.err == ""
    again = GalaxyVAE.read(tmp_path / "mine.safetensors")
    for name, tensor in vae.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name])


def test_train_from_weights(config, capsys):
    """Training goes on from weights that exist."""
    assert main(["train", config(), "-q"]) == 0
    lines = CONFIG.splitlines()
    text = "\n".join(line for line in lines if "preset" not in line and "options" not in line)
    path = config("", "")
    with open(path, "w") as file:
        file.write(text.replace("[model]", '[model]\nweights = "mine.safetensors"')
                   .replace('"mine.safetensors"\nplot', '"next.safetensors"\nplot'))  # fmt: skip
    assert main(["train", path]) == 0, capsys.readouterr().err
    assert "next.safetensors" in capsys.readouterr().out


def test_train_command_interrupted(config, tmp_path, capsys, monkeypatch):
    """Ctrl-C writes a checkpoint, says so, and the same command gives the same weights."""
    from galmorph.nets import GalaxyVAE

    assert main(["train", config("mine", "whole"), "-q"]) == 0
    elbo, calls = GalaxyVAE.elbo, []

    def interrupted(self, batch, **options):
        calls.append(1)
        if len(calls) == 7:
            ctrl_c()
        return elbo(self, batch, **options)

    monkeypatch.setattr(GalaxyVAE, "elbo", interrupted)
    assert main(["train", config()]) == 130
    said = capsys.readouterr().err
    assert "the same command goes on where it was stopped" in said
    assert "mine.safetensors.checkpoint" in said
    assert main(["train", config()]) == 0
    assert "going on with" in capsys.readouterr().err
    whole, resumed = (
        GalaxyVAE.read(tmp_path / f"{name}.safetensors").state_dict() for name in ("whole", "mine")
    )
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_train_command_gives_up(config, capsys, monkeypatch):
    from galmorph.nets import GalaxyVAE

    def nothing(self, batch, **options):
        bad = next(self.parameters()).sum() * batch.images.sum((1, 2)) * float("nan")
        return {"loss": bad, "log_likelihood": bad, "kl": bad}

    monkeypatch.setattr(GalaxyVAE, "elbo", nothing)
    assert main(["train", config(), "-q"]) == 1
    assert "not finite" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("", "[training", "not a TOML file"),
        ("", "[trainings]\n", "trainings: no such table; did you mean training?"),
        ("epochs = 3", "epoch = 3", "training.epoch: no such key; did you mean epochs?"),
        ("epochs = 3", 'epochs = "3"', "training.epochs: must be an integer, not '3'"),
        ("epochs = 3", "epochs = 0", "epochs must be at least 1"),
        ("epochs = 3", "epochs = 3\nbeta = [1, 2]", "beta holds 2 values for 3 epochs"),
        ("epochs = 3", 'epochs = 3\nschedule = "step"', "schedule must be one of"),
        ('"regier2015"', '"regier2051"', "model.preset: no preset 'regier2051'; did you mean"),
        ("hidden", "hiden", "model.options.hiden: regier2015 has no such option; did you mean"),
        ("hidden = [16]", "hidden = [-1]", "model.options: hidden"),
        ("preset", "weights = 'x'\npreset", "model.preset: either this or model.weights"),
        ('images = "stamps.npy"', "", "data.images: is missing"),
        ("stamps.npy", "nowhere.npy", "nowhere.npy: no such file"),
        ("uncertainty = 0.1", "uncertainty = [1]", "data.uncertainty: must be a path in quotes"),
        ("mine.safetensors", "mine.pt", "output.weights: must end in .safetensors"),
        ("losses.png", "no/losses.png", "output.plot"),
        ("", "[augmentation]\nshift = -1\n", "shift must be"),
        ("", "[augmentation]\nturns = 4\n", "augmentation.turns: must be true or false"),
    ],
)
def test_bad_configurations(old, new, message, config, capsys):
    """Code 2, and one line that names the key."""
    assert main(["train", config(old, new), "-q"]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


def test_augmentation_table(config, tmp_path, capsys):
    assert main(["train", config("", "[augmentation]\nflips = true\nshift = 1\n"), "-q"]) == 0
    assert main(["train", str(tmp_path / "none.toml")]) == 2
    assert "none.toml: no such file" in capsys.readouterr().err


def test_configuration_of_the_help(tmp_path, capsys):
    """The example in the help is one that can be read."""
    from galmorph.training.config import read_config

    assert main(["train", "--help"]) == 0
    said = capsys.readouterr().out
    text = said[said.index("  [model]") : said.index("then:")]
    (tmp_path / "help.toml").write_text(text)
    config = read_config(tmp_path / "help.toml")
    assert config.data["images"] == str(tmp_path / "stamps.fits[SCI]")
    assert config.augmentation == {"turns": True, "flips": True, "shift": 2}


# -- the plot ----------------------------------------------------------------------------


def test_loss_curves():
    history = {
        "epoch": np.arange(1, 9),
        "loss": np.array([9e5, 40, 30, 20, 10, 0, -10, -12.0]),
        "validation_loss": np.array([5e5, 50, 35, 25, 12, 5, 6, 7.0]),
        "kl": np.arange(8.0),
    }
    ax = plot.loss_curves(history)
    train_line, validation_line, best = ax.lines
    assert_array_equal(train_line.get_xydata(), np.c_[history["epoch"], history["loss"]])
    assert_array_equal(validation_line.get_ydata(), history["validation_loss"])
    assert best.get_xdata()[0] == 6
    assert ax.get_ylim()[1] < 1000  # the first epoch does not flatten the rest
    assert ax.get_ylabel() == "Loss per stamp [nat]"
    both = plot.loss_curves(history, ax=plt.figure().subplots(), terms=("loss", "kl"))
    assert [t.get_text() for t in both.get_legend().get_texts()] == [
        "loss, training", "loss, validation", "KL divergence, training", "best epoch: 6",
    ]  # fmt: skip
    plt.close("all")


def test_loss_curves_of_a_run():
    result = train(TinyVAE(), make_stamps(), validation=0, **OPTIONS | {"epochs": 1})
    ax = plot.loss_curves(result)
    assert ax.lines[0].get_marker() == "o"
    ax.figure.canvas.draw()
    with pytest.raises(ValueError, match="terms must be some of"):
        plot.loss_curves(result, terms=("chi2",))
    with pytest.raises(ValueError, match="holds no epoch"):
        plot.loss_curves({"epoch": []})
    plt.close("all")
