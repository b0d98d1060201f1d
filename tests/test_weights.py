"""Weights: files that are refused, plug-ins of other packages, and the command that lists them."""

import json
import pickle
import sys

import numpy as np
import pytest
import torch
from numpy.testing import assert_array_equal
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from galmorph import GalaxyVAE, nets
from galmorph.cli import main
from galmorph.nets import WeightsError, weights

ABOUT = {"training_data": "blobs", "training_data_hash": "sha256:0", "licence": "BSD-3-Clause"}
IMAGE = np.arange(1.0, 82.0).reshape(9, 9)


@pytest.fixture
def vae():
    torch.manual_seed(4)
    return nets.regier2015(image_shape=(9, 9), hidden=(7, 6), latent_size=3)


@pytest.fixture
def path(vae, tmp_path):
    vae.write(tmp_path / "mine.safetensors", metadata={**ABOUT, "note": {"epochs": [1, 2]}})
    return tmp_path / "mine.safetensors"


def header_of(path):
    with safe_open(path, framework="pt") as file:
        return file.metadata()


def rewrite(path, **changes):
    """The same tensors under a changed header."""
    tensors, header = load_file(path), header_of(path)
    header = {k: v for k, v in {**header, **changes}.items() if v is not None}
    save_file(tensors, path, metadata=header)


# -- files ---------------------------------------------------------------------------------


def test_round_trip(vae, path):
    again = GalaxyVAE.read(path)
    assert_array_equal(again.reconstruct(IMAGE), vae.reconstruct(IMAGE))
    assert not again.training
    assert again.config == vae.config
    about = again.metadata
    assert about["training_data"] == "blobs"
    assert about["note"] == {"epochs": [1, 2]}
    assert about["canonical_scale"] is None
    assert about["format_version"] == 1
    assert {"galmorph_version", "date", "licence", "training_data_hash", "sha256"} <= set(about)
    assert [p.name for p in path.parent.iterdir()] == ["mine.safetensors"]


def test_buffers_are_saved(path, vae):
    vae.prior = nets.GaussianMixture.empty(2, 3)
    nets.save(vae, path, metadata=ABOUT)
    # this network is no longer the one that its config describes
    with pytest.raises(WeightsError, match="does not fit the architecture"):
        nets.load(path)


def test_loading_leaves_the_random_numbers(path):
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    nets.load(path)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("size", [0, 5, 300, -1000, -1])
def test_cut_short(path, size):
    content = path.read_bytes()
    path.write_bytes(content[:size])
    with pytest.raises(WeightsError, match="cut short"):
        nets.load(path)


def test_every_damaged_byte_is_noticed(path, rng):
    """Whatever byte is changed: refused as damaged, or (in a note) still the same weights."""
    content = path.read_bytes()
    expected = nets.load(path).state_dict()
    for where in [*range(8), *rng.integers(8, len(content), 150)]:
        damaged = bytearray(content)
        damaged[where] ^= 0x11
        path.write_bytes(damaged)
        try:
            got = nets.load(path).state_dict()
        except WeightsError:
            continue
        assert all(torch.equal(value, got[name]) for name, value in expected.items())


def test_foreign_files(tmp_path, vae):
    other = tmp_path / "other.safetensors"
    save_file(vae.state_dict(), other)
    with pytest.raises(WeightsError, match="not written by galmorph"):
        nets.load(other)
    other.write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(WeightsError, match="not a safetensors file"):
        nets.load(other)
    with pytest.raises(FileNotFoundError, match="no such file"):
        nets.load(tmp_path / "nothing.safetensors")


def test_a_pickle_is_not_executed(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "executed"), "w"))

    torch.save({"a": Bomb()}, tmp_path / "bomb.safetensors")
    with pytest.raises(WeightsError):
        nets.load(tmp_path / "bomb.safetensors")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": "2"}, "version 2 .* reads version 1"),
        ({"format_version": None}, "version None"),
        ({"format": "something"}, "not written by galmorph"),
        ({"config": "{"}, "header cannot be read"),
        ({"config": "[" * 100000}, "header cannot be read"),
        ({"config": '"regier2015"'}, "does not fit"),
        ({"config": '{"preset": "os.system", "options": {}}'}, "no preset 'os.system'"),
        ({"config": '{"preset": ["a"], "options": {}}'}, "does not fit"),
        ({"config": '{"preset": "regier2015", "options": {"colour": 1}}'}, "colour"),
        ({"config": '{"preset": "regier2015", "options": {}}'}, "does not fit"),
        ({"licence": None}, "lacks licence"),
        ({"sha256": "0" * 64}, "checksum"),
    ],
)
def test_wrong_headers(path, changes, message):
    rewrite(path, **changes)
    with pytest.raises(WeightsError, match=message):
        nets.load(path)


def test_what_is_not_saved(vae, tmp_path):
    path = tmp_path / "a.safetensors"
    with pytest.raises(ValueError, match="must have training_data_hash, licence"):
        nets.save(vae, path, metadata={"training_data": "x"})
    with pytest.raises(ValueError, match="fills them in"):
        nets.save(vae, path, metadata={**ABOUT, "config": {}})
    with pytest.raises(ValueError, match="metadata must be"):
        nets.save(vae, path, metadata={**ABOUT, "rms": np.float32(1)})
    with torch.no_grad():
        vae.decoder.mean.bias[3] = float("nan")
    with pytest.raises(ValueError, match=r"not finite.*decoder\.mean\.bias"):
        nets.save(vae, path, metadata=ABOUT)
    assert not list(tmp_path.iterdir())


# -- what is installed ---------------------------------------------------------------------


def test_shipped_weights():
    """Each has a card, and loads."""
    shipped = [w for w in nets.available() if w.provider == "galmorph"]
    assert "regier2015" in {w.name for w in shipped}
    for one in shipped:
        assert not one.problem
        assert one.path.with_suffix(".rst").is_file()
        assert GalaxyVAE.from_pretrained(one.name).metadata["licence"] == "BSD-3-Clause"


def test_regier2015():
    """As published in shape, and a fair drawing of a simple galaxy."""
    vae = GalaxyVAE.from_pretrained("regier2015")
    assert sum(p.numel() for p in vae.parameters()) == nets_size()
    y, x = np.mgrid[:69, :69] - 34.0
    galaxy = 150 * np.exp(-np.hypot(x, y / 0.7) / 7)
    mean, std = vae.reconstruct(galaxy)
    assert np.sum((mean - galaxy) ** 2) < 0.05 * np.sum(galaxy**2)
    assert (std > 0).all()


def nets_size():
    return sum(p.numel() for p in nets.regier2015().parameters())


@pytest.fixture
def plugin(tmp_path, monkeypatch, path):
    """A distribution that is installed in a folder, with weights by entry point."""
    folder = tmp_path / "site"

    def install(name="survey-galaxies", points=("survey = survey_galaxies:PATH",), code=None):
        module = name.replace("-", "_")
        package = folder / module
        package.mkdir(parents=True)
        (package / "mine.safetensors").write_bytes(path.read_bytes())
        code = code or (
            "from pathlib import Path\n"
            "PATH = Path(__file__).parent / 'mine.safetensors'\n"
            "def find():\n    return str(PATH)\n"
        )
        (package / "__init__.py").write_text(code)
        info = folder / f"{module}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text("[galmorph.weights]\n" + "\n".join(points) + "\n")
        monkeypatch.syspath_prepend(str(folder))
        return package

    yield install
    for name in [n for n in sys.modules if n.endswith("_galaxies")]:
        del sys.modules[name]


def named(name):
    return [w for w in nets.available() if w.name == name]


@pytest.mark.parametrize("target", ["PATH", "find"])
def test_weights_of_another_package(plugin, vae, target):
    package = plugin(points=[f"survey = survey_galaxies:{target}"])
    (found,) = named("survey")
    assert found.provider == "survey-galaxies"
    assert found.path == package / "mine.safetensors"
    assert found.metadata["training_data"] == "blobs"
    loaded = GalaxyVAE.from_pretrained("survey")
    assert_array_equal(loaded.reconstruct(IMAGE), vae.reconstruct(IMAGE))


def test_a_name_that_is_taken(plugin):
    plugin(points=["regier2015 = survey_galaxies:PATH", "default = survey_galaxies:PATH"])
    ours, theirs = named("regier2015")
    assert not ours.problem
    assert "taken" in theirs.problem
    assert "taken" in named("default")[0].problem
    assert GalaxyVAE.from_pretrained("regier2015").image_shape == (69, 69)


def test_a_package_that_fails(plugin):
    plugin(points=["broken = survey_galaxies:find"], code="def find():\n    return 1 / 0\n")
    with pytest.warns(UserWarning, match=r"'broken' of survey-galaxies.*ZeroDivisionError"):
        (found,) = named("broken")
    assert found.path is None
    with (
        pytest.warns(UserWarning, match="broken"),
        pytest.raises(WeightsError, match="ZeroDivisionError"),
    ):
        GalaxyVAE.from_pretrained("broken")


def test_a_package_with_damaged_weights(plugin):
    (plugin() / "mine.safetensors").write_bytes(b"nothing")
    assert "not a safetensors file" in named("survey")[0].problem
    with pytest.raises(WeightsError, match="'survey' cannot be used"):
        GalaxyVAE.from_pretrained("survey")


def test_unknown_names():
    with pytest.raises(WeightsError, match=r"no weights 'nobody'; installed: .*regier2015"):
        GalaxyVAE.from_pretrained("nobody")


def test_default_is_galmorph(monkeypatch, tmp_path, vae):
    nets.save(vae, tmp_path / "galmorph.safetensors", metadata=ABOUT)
    monkeypatch.setattr(weights, "_PRETRAINED", tmp_path)
    assert GalaxyVAE.from_pretrained().metadata["training_data"] == "blobs"


# -- the command ---------------------------------------------------------------------------


def test_command_lists(plugin, capsys):
    plugin()
    assert main(["weights"]) == 0
    out = capsys.readouterr().out
    lines = {line.split()[0]: line for line in out.splitlines()}
    assert "Galaxy Zoo" in lines["regier2015"]
    assert "survey-galaxies" in lines["survey"]
    assert "blobs" in lines["survey"]


def test_command_shows_one(capsys):
    assert main(["weights", "regier2015"]) == 0
    out = capsys.readouterr().out
    for text in ("licence: BSD-3-Clause", "training_data_hash: sha256:", "config: {"):
        assert text in out
    json.loads(next(r for r in out.splitlines() if r.startswith("held_out:")).split(":", 1)[1])


def test_command_does_not_know(capsys):
    assert main(["weights", "nobody"]) == 2
    err = capsys.readouterr().err
    assert "no weights 'nobody'" in err
    assert "regier2015" in err


def test_command_shows_problems(plugin, capsys):
    (plugin() / "mine.safetensors").write_bytes(b"nothing")
    assert main(["weights"]) == 0
    assert "cannot be used" in capsys.readouterr().out


def test_half_the_size(tmp_path):
    """Parts in 16 bits: a file of half the size that is read into 32 bits again."""
    vae = nets.regier2015(image_shape=(21, 21))
    about = {"training_data": "none", "training_data_hash": "none", "licence": "BSD-3-Clause"}
    nets.save(vae, tmp_path / "whole.safetensors", metadata=about)
    nets.save(vae, tmp_path / "half.safetensors", metadata=about, half=["encoder", "decoder"])
    sizes = [(tmp_path / f"{n}.safetensors").stat().st_size for n in ("half", "whole")]
    assert sizes[0] < 0.55 * sizes[1]
    again = nets.load(tmp_path / "half.safetensors").state_dict()
    for name, value in vae.state_dict().items():
        assert again[name].dtype == value.dtype
        assert torch.allclose(again[name], value, rtol=1e-3, atol=1e-6)
