"""Text encoders that are on the devices only while prompts are encoded."""

import jax
import jax.numpy as jnp
import numpy as np
import originals
import pytest
import tiny

import jaxdiff
from jaxdiff.checkpoints import loading
from jaxdiff.core.errors import InputError
from jaxdiff.models.build import param_dict
from jaxdiff.pipeline import batches

PROMPTS = ["a small red circle", "a large blue star above a green square"]
CALL = {"seed": [3, 4], "steps": 2, "sampler": "dpmpp-2m", "output": "numpy"}
MESHES = [None, "fsdp=4,tensor=2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.write_xl(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module", params=MESHES)
def pair(request, folder):
    """A model with two text encoders with and without them on the devices all the time."""
    pipes = [jaxdiff.load(folder, mesh=request.param, offload=how) for how in ("text", None)]
    return [tiny.with_linear_unet(pipe) for pipe in pipes]


@pytest.fixture
def copies(monkeypatch):
    """The copies of weights that are made from now on, on any device."""
    made = []

    def place_weight(*arguments):
        made.append(loading.place_weight(*arguments))
        return made[-1]

    monkeypatch.setattr("jaxdiff.pipeline.offload.place_weight", place_weight)
    return made


def weights_of(pipe):
    return [leaf for module in pipe.text_encoders for leaf in param_dict(module).values()]


def test_images_are_equal_bit_for_bit(pair):
    offloaded, plain = pair
    for options in ({}, {"guidance_scale": 1.0}, {"batch_size": 1}):
        images = [pipe(PROMPTS, **CALL, **options).images for pipe in (offloaded, plain)]
        np.testing.assert_array_equal(*images)


def test_no_copy_is_left_when_the_loop_begins(pair, copies, monkeypatch):
    pipe, _ = pair
    stages, at_the_loop = pipe.stages, []
    denoise = stages.denoise

    def watched(*arguments, **options):
        at_the_loop.append([copy.is_deleted() for copy in copies])
        return denoise(*arguments, **options)

    monkeypatch.setattr(stages, "denoise", watched)
    pipe(PROMPTS, **CALL)
    assert [len(deleted) for deleted in at_the_loop] == [len(weights_of(pipe))]
    assert all(at_the_loop[0])
    assert not any(weight.is_deleted() for weight in weights_of(pipe))


def test_copies_lie_on_the_devices_as_weights_do_that_stay_there(pair, copies):
    """A device of a mesh gets its part of them only."""
    offloaded, plain = pair
    with offloaded.stages.text_encoders_on_devices():
        shards = [{s.device: s.index for s in copy.addressable_shards} for copy in copies]
    want = [{s.device: s.index for s in w.addressable_shards} for w in weights_of(plain)]
    assert sorted(map(str, shards)) == sorted(map(str, want))
    assert all(len(each) == len(jax.devices()) for each in shards)


def test_weights_stay_on_the_host(pair):
    for weight in weights_of(pair[0]):
        assert weight.sharding == loading.host_memory()


def test_a_call_of_many_batches_copies_the_weights_once(pair, copies, monkeypatch):
    pipe, _ = pair
    requests = pipe.resolve(PROMPTS[0], seed=range(6), steps=1)
    images = [image for _, out in pipe.stream(requests, batch_size=2) for image in out.images]
    assert len(copies) == len(weights_of(pipe))
    copies.clear()
    monkeypatch.setattr(batches, "ENCODED_AHEAD", 1)  # one batch at a time
    again = [image for _, out in pipe.stream(requests, batch_size=2) for image in out.images]
    assert len(copies) % len(weights_of(pipe)) == 0
    assert len(copies) > len(weights_of(pipe))
    np.testing.assert_array_equal(np.stack(images), np.stack(again))


def test_a_weaker_model_is_offloaded_too(pair, folder, copies):
    pipe, plain = pair
    call = {**CALL, "guidance": "autoguidance"}
    images = []
    for each in (pipe, plain):
        weaker = jaxdiff.load(folder, mesh=each.mesh, offload=each.offload)
        each.set_guidance_model(tiny.with_linear_unet(weaker, seed=2))
        images.append(each(PROMPTS, **call).images)
        each.set_guidance_model(None)
    np.testing.assert_array_equal(*images)
    assert len(copies) == 2 * len(weights_of(pipe))
    assert all(copy.is_deleted() for copy in copies)


def test_textual_inversions_and_loras_change_the_weights_on_the_host(pair, tmp_path):
    """The copies on the devices are those of the weights at that time."""
    rng = np.random.default_rng(0)
    vectors = {f"clip_{name}": rng.normal(size=(2, n)) for name, n in (("l", 8), ("g", 12))}
    word = originals.write_safetensors(
        tmp_path / "thing.safetensors", {k: v.astype(np.float32) for k, v in vectors.items()}
    )
    names = [
        f"lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_{x}.weight" for x in ("down", "up")
    ]
    width = param_dict(pair[0].text_encoder)["text_model.encoder.layers.0.mlp.fc1.kernel"].shape
    shapes = (2, width[0]), (width[1], 2)
    lora = originals.write_safetensors(
        tmp_path / "lora.safetensors",
        {n: rng.normal(size=s).astype(np.float32) for n, s in zip(names, shapes, strict=True)},
    )
    before, images = pair[1](PROMPTS, **CALL).images, []
    for pipe in pair:
        pipe.load_textual_inversion(word)
        pipe.load_lora(lora)
        images.append(pipe([f"a {word.stem}", PROMPTS[1]], **CALL).images)
        pipe.unload_loras()
        pipe.unload_textual_inversions()
    np.testing.assert_array_equal(*images)
    assert np.any(images[0][1] != before[1])
    np.testing.assert_array_equal(pair[0](PROMPTS, **CALL).images, before)
    assert all(weight.sharding == loading.host_memory() for weight in weights_of(pair[0]))


def test_the_modules_can_be_called_and_saved(folder, tmp_path):
    pipe, plain = jaxdiff.load(folder, offload="text"), jaxdiff.load(folder)
    ids = jnp.arange(12)[None]
    np.testing.assert_allclose(pipe.text_encoder(ids), plain.text_encoder(ids), atol=1e-5)
    assert pipe.fingerprint == plain.fingerprint
    pipe.save(tmp_path / "saved")
    again = jaxdiff.load(tmp_path / "saved", offload="text")
    for one, other in zip(weights_of(again), weights_of(plain), strict=True):
        np.testing.assert_array_equal(one, other)


def test_inversions_encode_too(pair):
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    found = [pipe.invert(pixels, PROMPTS[0], steps=2) for pipe in pair]
    np.testing.assert_array_equal(*found)


def test_what_cannot_be_offloaded(folder, monkeypatch):
    with pytest.raises(InputError, match="offload: got 'vae', expected one of text"):
        jaxdiff.load(folder, offload="vae")
    monkeypatch.setattr("jaxdiff.pipeline.load.host_memory", lambda: None)
    with pytest.raises(InputError, match="offload: got 'text' where JAX sees no CPU"):
        jaxdiff.load(folder, offload="text")


def test_copies_are_freed_where_encoding_fails(pair, copies, monkeypatch):
    pipe, _ = pair

    def fail(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(type(pipe.stages), "encode_ahead", fail)
    with pytest.raises(KeyboardInterrupt):
        pipe(PROMPTS, **CALL)
    assert copies
    assert all(copy.is_deleted() for copy in copies)
