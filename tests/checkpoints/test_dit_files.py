"""Files of DiT and of SiT, whose tensors are the same, against the forward pass of their code."""

import dataclasses
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import original_dit
import originals
import pytest
import safetensors
import tiny
import transformer_files as models

import jaxdiff
from jaxdiff.checkpoints.models import read_model
from jaxdiff.checkpoints.pipelines import read_pipeline, write_pipeline
from jaxdiff.checkpoints.single_file_settings import METADATA_KEY
from jaxdiff.cli import main
from jaxdiff.core.errors import InputError
from jaxdiff.models.dit.module import DiTTransformer2DModel

CLASSES = len(models.NAMES)
FLOW = {"prediction_type": "flow_prediction"}


def convert(source, target, *options):
    with warnings.catch_warnings():
        warnings.simplefilter("default")  # which are printed
        assert main.run("convert", [str(source), str(target), *options]) == 0


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder of DiT, and a file of random tensors without a header, as the code stores them."""
    place = tmp_path_factory.mktemp("dit")
    folder, file = place / "folder", place / "converted.safetensors"
    write_pipeline(folder, models.components("dit", place))
    convert(folder, file)
    own = {n.removeprefix("model.diffusion_model."): a for n, a in models.arrays(file).items()}
    rng = np.random.default_rng(0)
    for name, values in own.items():
        if name != "pos_embed":  # which no training changes
            own[name] = rng.normal(scale=0.15, size=values.shape).astype(np.float32)
    path = place / "x.safetensors"
    originals.write_safetensors(path, own)
    return folder, path, own


def inputs():
    rng = np.random.default_rng(1)
    return rng.normal(size=(3, 8, 8, 4)).astype(np.float32), np.array([0, CLASSES, 2])


def output(parts, x, t, labels):
    network = parts.components["transformer"].module
    call = jax.jit(lambda *arrays: network(*arrays))
    return call(jnp.asarray(x), jnp.asarray(t, jnp.float32), jnp.asarray(labels, jnp.int32))


def agree(got, wanted):
    assert np.ptp(wanted) > 1
    np.testing.assert_allclose(got, wanted, atol=2e-5 * np.abs(wanted).max())


def test_a_file_of_dit_gives_the_output_of_its_code(files):
    """Frequencies of timesteps and the epsilon of norms are the code's, not those of diffusers."""
    folder, path, tensors = files
    (x, labels), t = inputs(), np.array([0, 500.5, 999])
    wanted = original_dit.network(tensors, x, t, labels, heads=1)
    agree(output(read_model(path, base=folder), x, t, labels), wanted)


def test_a_file_of_sit_has_the_velocity_of_its_code(files):
    """v(x, t) = -u(x, 1 - t / 1000), as noise is at 0 there and at 1000 here."""
    folder, path, tensors = files
    (x, labels), t = inputs(), np.array([0, 250, 1000])
    wanted = -original_dit.network(tensors, x, 1 - t / 1000, labels, heads=1)
    agree(output(read_model(path, base=folder, **FLOW), x, t, labels), wanted)


@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_the_ode_of_sit(files, scale):
    """20 steps of Euler in its own convention, with its guidance of 3 channels."""
    folder, path, tensors = files
    pipe = tiny.first_devices(jaxdiff.load(path, base=folder, dtype="float32", **FLOW), 1)
    noise, times = inputs()[0][:2], np.linspace(0, 1, 21)
    wanted = original_dit.ode(tensors, noise, times, [2, 0], scale, null=CLASSES, heads=1)
    got = pipe(
        ["2", "0"],
        latents=noise,
        steps=20,
        guidance="cfg:channels=3",
        guidance_scale=scale,
        output="latent",
    ).images
    assert pipe.defaults.sampler == "euler"
    assert np.abs(wanted - noise).max() > 0.3
    assert np.abs(got - wanted).max() < 1e-3 * np.abs(wanted).max()


def test_sit_there_and_back(files, tmp_path, capsys):
    """A folder of its own, whose config says how its times run, and again its file."""
    folder, path, tensors = files
    own, again = tmp_path / "folder", tmp_path / "again.safetensors"
    convert(path, own, "--base", str(folder), "--prediction-type", "flow_prediction")
    config = read_pipeline(own, only=()).components["transformer"].module.config
    assert (config.reverses_time, config.freq_shift, config.norm_eps) == (True, 0, 1e-6)
    convert(own, again)
    assert "got vae: a single file of SiT does not hold it" in capsys.readouterr().err
    written = {n.removeprefix("model.diffusion_model."): a for n, a in models.arrays(again).items()}
    assert written.keys() == tensors.keys()
    for name, values in tensors.items():
        np.testing.assert_array_equal(written[name], values, err_msg=name)
    with safetensors.safe_open(again, "np") as file:
        assert file.metadata()[METADATA_KEY] == "flow"
    # which says what it is
    assert read_model(again, base=folder, only=()).scheduler["shift"] == 1.0
    capsys.readouterr()
    assert main.run("inspect", [str(again)]) == 0
    assert "SiT (single file), predicts flow_prediction" in capsys.readouterr().out


def test_a_file_is_of_dit_unless_something_says_otherwise(files):
    folder, path, _ = files
    assert read_model(path, base=folder, only=()).scheduler["prediction_type"] == "epsilon"


def test_a_flow_in_the_names_of_diffusers_is_refused(files, tmp_path):
    folder, _, _ = files
    names = models.arrays(folder / "transformer" / "diffusion_pytorch_model.safetensors")
    path = originals.write_safetensors(tmp_path / "x.safetensors", names)
    with pytest.raises(InputError, match="got a flow in the names of diffusers, expected the name"):
        read_model(path, base=folder, **FLOW)


def test_fields_that_the_code_does_not_have(files, tmp_path, capsys):
    """Folders of diffusers have its frequencies, which its own code has not."""
    folder, _, _ = files
    parts = read_pipeline(folder)
    config = dataclasses.replace(models.DIT, freq_shift=1)
    network = models.tied(tiny.random_component(DiTTransformer2DModel, config))
    components = {**parts.components, "transformer": network}
    write_pipeline(tmp_path / "folder", dataclasses.replace(parts, components=components))
    convert(tmp_path / "folder", tmp_path / "x.safetensors")
    assert "transformer: freq_shift: got 1, expected 0" in capsys.readouterr().err


def test_no_variance_of_a_flow_is_read(files):
    folder, path, _ = files
    pipe = tiny.first_devices(jaxdiff.load(path, base=folder, dtype="float32", **FLOW), 1)
    with pytest.raises(InputError, match="variance: got learned_range for a network"):
        pipe.resolve("2", sampler="ddpm:variance=learned_range")
