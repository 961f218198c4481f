"""A pipeline on meshes of 8 fake devices: the images of one device, and nobody holds more."""

import functools

import jax
import numpy as np
import originals
import pytest
import tiny
from jax.sharding import Mesh

import jaxdiff
from jaxdiff.core.errors import InputError
from jaxdiff.models.build import param_dict
from jaxdiff.parallel.mesh import sampling_mesh
from jaxdiff.pipeline.compiled_model import denoise_steps

PROMPT = "a small red circle"
CALL = {"seed": [3, 4], "steps": 3, "sampler": "dpmpp-2m"}
MESHES = ["fsdp=8", "fsdp=4,tensor=2", "guidance=2,tensor=2", "fsdp=2,guidance=2,tensor=2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.write_tiny(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module", params=MESHES)
def sharded(request, folder):
    """The tiny model on a mesh."""
    return jaxdiff.load(folder, mesh=request.param)


@pytest.fixture(scope="module")
def pair(folder):
    """The tiny model on two devices that share the streams of an image."""
    return jaxdiff.load(folder, mesh=Mesh(np.array(jax.devices()[:2]), ("guidance",)))


def close(a, b):
    """Equal but for the order in which float32 numbers are added."""
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max())


def loop_flops(pipe):
    """What the compiler counts for a device in the sampling loop, each loop body once."""
    programs = pipe.stages._programs.items()
    (loop,) = (program for (function, _), program in programs if function is denoise_steps)
    (executable,) = loop._executables.values()
    return executable.cost_analysis()["flops"]


def held(modules):
    """The bytes of weights that each device holds, and of all weights."""
    leaves = [leaf for module in modules for leaf in param_dict(module).values()]
    sizes = dict.fromkeys(jax.devices(), 0)
    for shard in (shard for leaf in leaves for shard in leaf.addressable_shards):
        sizes[shard.device] += shard.data.nbytes
    return list(sizes.values()), sum(leaf.nbytes for leaf in leaves)


def test_the_images_are_those_of_one_device(sharded, one_device):
    out = sharded(PROMPT, output="latent", **CALL).images
    close(out, one_device(PROMPT, output="latent", **CALL).images)
    images = [pipe.decode_latents(out) for pipe in (sharded, one_device)]
    assert np.abs(np.subtract(*images, dtype=int)).max() <= 1


def test_images_are_encoded_as_on_one_device(sharded, one_device):
    pixels = np.random.default_rng(0).integers(0, 256, (1, 16, 16, 3), np.uint8)
    call = {**CALL, "image": pixels, "strength": 0.7, "output": "latent"}
    close(sharded(PROMPT, **call).images, one_device(PROMPT, **call).images)


@pytest.mark.parametrize("text", MESHES)
def test_no_device_holds_more_than_its_share(text):
    """Of the embedded model, whose layers are as wide as those of others."""
    pipe = jaxdiff.load(mesh=text)
    each, total = held([pipe.unet, pipe.vae, *pipe.text_encoders])
    fsdp, tensor = (pipe.mesh.shape[axis] for axis in ("fsdp", "tensor"))
    assert max(each) == min(each)
    assert max(each) < total / (fsdp * tensor) * 1.6
    assert max(each) < total / fsdp * 1.15


def test_the_streams_of_an_image_are_on_different_devices(pair, folder):
    one = tiny.first_devices(jaxdiff.load(folder), 1)
    call = {**CALL, "seed": 3, "output": "latent"}
    close(pair(PROMPT, **call).images, one(PROMPT, **call).images)
    assert loop_flops(pair) < 0.6 * loop_flops(one)


def test_devices_without_a_stream_are_reported(pair):
    with pytest.warns(UserWarning, match=r"mesh.guidance: 2 devices repeat .* 1 x 1 guidance"):
        pair(PROMPT, steps=1, guidance_scale=1.0, output="latent")


def test_arrays_stay_on_the_devices_between_the_stages(pair, monkeypatch):
    """Nothing reaches the host but the images, and which are finite; no stage moves more."""
    seen, stages = [], pair.stages
    gather = stages.gather
    monkeypatch.setattr(stages, "gather", lambda array: seen.append(array.dtype) or gather(array))
    call = {"seed": 3, "steps": 3, "output": "numpy"}
    pair(PROMPT, **call)

    def guarded(stage, *arguments, **options):
        with jax.transfer_guard("disallow"):
            return stage(*arguments, **options)

    for name in ("encode", "noise", "denoise", "decode"):
        monkeypatch.setattr(stages, name, functools.partial(guarded, getattr(stages, name)))
    seen.clear()
    pair(PROMPT, **call)
    assert seen == [np.uint8, np.bool_]


@pytest.fixture(scope="module")
def linear(folder, classifier, clip):
    """A model with a linear UNet and guiding networks, on a mesh and on one device."""
    on_mesh = jaxdiff.load(folder, mesh={"fsdp": 4, "tensor": 2})
    pipes = [tiny.with_linear_unet(p) for p in (on_mesh, tiny.first_devices(on_mesh, 1))]
    for pipe in pipes:
        pipe.load_classifier(classifier)
        pipe.load_clip(clip)
    return pipes


OPTIONS = {
    "plain": {},
    "classifier": {"classifier_scale": 5.0},
    "clip": {"clip_scale": 100.0},
    "autoguidance": {"guidance": "autoguidance"},
    "pag": {"guidance": "pag"},
    "interval": {"guidance": "apg+interval:lo=1,hi=5"},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_what_guides_works_on_a_mesh(linear, options):
    for pipe in linear:
        pipe.set_guidance_model(tiny.with_linear_unet(pipe, seed=7))
    first, second = (pipe(PROMPT, output="latent", **CALL, **options).images for pipe in linear)
    close(first, second)
    if options:
        plain = linear[1](PROMPT, output="latent", **CALL).images
        assert np.abs(second - plain).max() > 1e-3 * np.abs(plain).max()


def test_weights_that_change_stay_in_their_shards(linear, tmp_path):
    prompt = "a thing circle"
    plain = linear[1](prompt, output="latent", **CALL).images
    vectors = np.random.default_rng(0).normal(size=(1, 8)).astype(np.float32)
    word = originals.write_safetensors(tmp_path / "thing.safetensors", {"emb_params": vectors})
    lora = tiny.write_lora(linear[1], tmp_path / "lora.safetensors", 1)
    before = held([linear[0].unet, linear[0].vae])
    for pipe in linear:
        pipe.load_textual_inversion(word)
        pipe.load_lora(lora)
    first, second = (pipe(prompt, output="latent", **CALL).images for pipe in linear)
    close(first, second)
    assert np.abs(second - plain).max() > 1e-3 * np.abs(plain).max()
    assert held([linear[0].unet, linear[0].vae]) == before
    table = linear[0].text_encoder.text_model.embeddings.token_embedding.embedding[...]
    assert table.addressable_shards[0].data.size * 4 == table.size


ERRORS = [
    ("fsdp=3", "mesh: got fsdp 3, expected sizes whose product divides 8"),
    ("rows=2", "mesh: got 'rows', expected one of data, fsdp, guidance, tensor"),
    ("fsdp", "mesh: got 'fsdp', expected axes and sizes, such as fsdp=4,tensor=2"),
    ("fsdp=4,fsdp=2", "mesh: got 'fsdp=4,fsdp=2', expected each axis once"),
    ("fsdp=0", "mesh.fsdp: got 0, expected a number above 0"),
    ("data=2,fsdp=2", "mesh: got data 2, fsdp 2, expected sizes whose product is 8"),
]


@pytest.mark.parametrize(("text", "message"), ERRORS)
def test_a_mesh_that_does_not_fit_is_refused(folder, text, message):
    with pytest.raises(InputError, match=message):
        jaxdiff.load(folder, mesh=text)


def test_an_axis_that_divides_no_weight_is_refused(folder):
    seven = Mesh(np.array(jax.devices()[:7]), ("tensor",))
    with pytest.raises(InputError, match=r"mesh.tensor: got 7, expected a size that divides some"):
        jaxdiff.load(folder, mesh=seven)


def test_a_weaker_model_is_on_the_same_mesh(pair, one_device):
    with pytest.raises(InputError, match="guidance_model: got a model with no mesh, expected"):
        pair.set_guidance_model(one_device)


def test_sizes_and_meshes():
    devices = jax.devices()
    shape = {"data": 2, "fsdp": 2, "tensor": 2}
    assert dict(sampling_mesh({"fsdp": 2, "tensor": 2}, devices).shape) == shape
    assert sampling_mesh({"fsdp": -1}, devices).shape["fsdp"] == 8
    given = Mesh(np.array(devices[:4]).reshape(2, 2), ("tensor", "guidance"))
    mesh = sampling_mesh(given, devices)
    assert dict(mesh.shape) == {"data": 1, "fsdp": 1, "guidance": 2, "tensor": 2}
    assert mesh.devices[0, 0].tolist() == given.devices.T.tolist()
