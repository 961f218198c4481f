"""The whole path against a plain reference, and what must not change a picture."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import originals
import pytest
import tiny
from flax import nnx
from tiny import first_devices

import jaxdiff
from jaxdiff.checkpoints.pipelines import write_pipeline
from jaxdiff.core.errors import InputError
from jaxdiff.data.tokenizer import tokenize

PROMPT = "a small red circle"


def reference_latents(pipe, prompt, noise, steps, w):
    """DDIM with guidance (2010.02502, eq. 12; 2207.12598, eq. 6), written out in float64.

    Two separate network calls a step, the step's levels from abar alone.
    """
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    abar = np.cumprod(1 - betas)
    times = (np.arange(steps) * (1000 // steps))[::-1] + 1
    call = nnx.jit(lambda module, *arguments: module(*arguments))
    ids = [jnp.asarray(tokenize(pipe.tokenizer, [text])) for text in ("", prompt)]
    contexts = [call(pipe.text_encoder, i) for i in ids]
    x = np.asarray(noise, np.float64)
    for i, t in enumerate(times):
        inputs = jnp.asarray(x, jnp.float32), jnp.full(1, float(t))
        uncond, cond = (np.asarray(call(pipe.unet, *inputs, c), np.float64) for c in contexts)
        v = uncond + w * (cond - uncond)
        a, s = np.sqrt(abar[t]), np.sqrt(1 - abar[t])
        x0, eps = a * x - s * v, s * x + a * v
        after = abar[times[i + 1]] if i + 1 < steps else 1.0
        x = np.sqrt(after) * x0 + np.sqrt(1 - after) * eps
    return x


@pytest.fixture(scope="module")
def noise():
    return np.random.default_rng(0).normal(size=(1, 8, 8, 4)).astype(np.float32)


@pytest.mark.parametrize("w", [0.0, 1.0, 3.5])
def test_latents_equal_a_plain_reference(one_device, noise, w):
    got = one_device(
        PROMPT, latents=noise, guidance_scale=w, steps=4, sampler="ddim", output="latent"
    ).images
    want = reference_latents(one_device, PROMPT, noise, 4, w)
    assert np.abs(got - want).max() < 2e-5 * np.abs(want).max()


def test_images_are_the_decoded_latents(single, noise):
    latents = single(PROMPT, latents=noise, output="latent").images
    images = single(PROMPT, latents=noise, output="numpy").images
    decoded = np.asarray(single.vae.decode(jnp.asarray(latents) / 0.7))
    want = np.clip(decoded / 2 + 0.5, 0, 1) * 255
    assert images.dtype == np.uint8
    assert np.abs(images - want).max() < 0.502


def test_one_compilation_serves_any_prompt_seed_scale_and_steps(pipe):
    pipe(["x", "y"], guidance_scale=[2.0, 3.0], seed=[1, 2], steps=3)
    before = pipe.stages.compilations
    out = pipe(["a star", "ring"], guidance_scale=[0.0, 9.0], seed=[5, 4], steps=7)
    assert pipe.stages.compilations == before
    assert out.timings["compile_s"] == 0


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_a_seed_is_the_same_image_in_any_batch_on_any_devices(pipe, one_device, sampler):
    prompts = [f"a {c} star" for c in "abcdefgh"]
    shared = {"sampler": sampler, "output": "latent", "guidance_scale": 4.0}
    batch = pipe(prompts, seed=11, **shared).images
    for i in (0, 5):
        alone = one_device(prompts[i], seed=11 + i, **shared).images[0]
        assert np.abs(batch[i] - alone).max() < 1e-5 * np.abs(alone).max()


def test_a_padded_last_batch_changes_nothing(single):
    whole = single(["a", "b", "c"], seed=0, output="latent").images
    cut = single(["a", "b", "c"], seed=0, batch_size=2, output="latent").images
    assert np.abs(whole - cut).max() < 1e-5 * np.abs(whole).max()


def test_seeds_differ_and_repeat(single):
    one, two, again = (single(PROMPT, seed=s, output="latent").images for s in (1, 2, 1))
    assert np.array_equal(one, again)
    assert np.abs(one - two).max() > 0.1


def test_a_negative_prompt_equal_to_the_prompt_cancels_the_scale(single):
    """g = c + w (c - c): the plain conditional model whatever w."""
    plain, cancelled = (
        single(PROMPT, negative_prompt=n, guidance_scale=w, output="latent").images
        for n, w in (("", 1.0), (PROMPT, 8.0))
    )
    assert np.abs(plain - cancelled).max() < 1e-5 * np.abs(plain).max()


def test_scales_of_a_mixed_batch_are_those_of_single_calls(single):
    mixed = single([PROMPT, PROMPT], guidance_scale=[1.0, 3.0], seed=[0, 0], output="latent").images
    for row, w in enumerate((1.0, 3.0)):
        alone = single(PROMPT, guidance_scale=w, seed=0, output="latent").images[0]
        assert np.abs(mixed[row] - alone).max() < 1e-5 * np.abs(alone).max()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_draws_nearly_the_same(pipe, tmp_path, dtype):
    pipe.save(tmp_path / "copy")
    half = jaxdiff.load(tmp_path / "copy", dtype=dtype)
    exact, rough = (p([PROMPT] * 2, seed=3, output="numpy").images for p in (pipe, half))
    error = np.abs(exact.astype(float) - rough)
    assert 0 < error.mean() < 6


def with_scheduler(pipe, folder, name):
    """Write the model with another scheduler class and no defaults of its own."""
    scheduler = {**pipe.parts.scheduler, "_class_name": name}
    write_pipeline(folder, dataclasses.replace(pipe.parts, scheduler=scheduler, defaults={}))
    return folder


def test_a_model_with_an_unknown_scheduler_draws_with_a_named_sampler(pipe, tmp_path):
    copy = jaxdiff.load(with_scheduler(pipe, tmp_path / "copy", "SASolverScheduler"))
    with pytest.raises(InputError, match="sampler: got none for a model whose scheduler"):
        copy(PROMPT, steps=2)
    assert copy(PROMPT, steps=2, sampler="euler", output="latent").images.shape == (1, 8, 8, 4)
    other = jaxdiff.load(with_scheduler(pipe, tmp_path / "other", "PNDMScheduler"))
    assert other.defaults.sampler == "pndm:skip_prk_steps=false"
    distilled = jaxdiff.load(with_scheduler(pipe, tmp_path / "distilled", "LCMScheduler"))
    defaults = distilled.defaults
    assert (defaults.sampler, defaults.steps, defaults.guidance_scale) == ("lcm", 4, 1.0)
    assert distilled(PROMPT, output="latent").images.shape == (1, 8, 8, 4)
    with pytest.raises(InputError, match="steps: got 51, expected at most the 50"):
        distilled(PROMPT, steps=51)


def test_a_folder_of_a_latent_consistency_model(pipe, tmp_path):
    folder = with_scheduler(pipe, tmp_path / "lcm", "LCMScheduler")
    index = folder / "model_index.json"
    name = "LatentConsistencyModelPipeline"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"_class_name": name}))
    model = jaxdiff.load(folder)
    defaults = model.defaults
    assert (defaults.sampler, defaults.steps, defaults.guidance_scale) == ("lcm", 4, 8.5)
    model.save(tmp_path / "copy")
    saved = json.loads((tmp_path / "copy/model_index.json").read_text())
    assert (saved["_class_name"], saved["safety_checker"]) == (name, [None, None])


def test_latents_of_edm_are_divided_by_sigma_data(pipe, tmp_path):
    edm = jaxdiff.load(with_scheduler(pipe, tmp_path / "edm", "EDMEulerScheduler"))
    way = {"steps": 2, "seed": 3}
    latents = edm(PROMPT, output="latent", **way).images
    images = edm(PROMPT, output="numpy", **way).images
    decoded = edm.vae.decode(edm.vae.unscale(jnp.asarray(0.5 * latents)))
    expected = np.clip(np.round((np.asarray(decoded) + 1) * 127.5), 0, 255)
    assert np.abs(images - expected).max() <= 1


def test_save_and_load_draws_the_same_image(pipe, tmp_path):
    pipe.save(tmp_path / "copy")
    copy = jaxdiff.load(tmp_path / "copy")
    one, two = (p(PROMPT, seed=3, output="numpy").images for p in (pipe, copy))
    assert np.array_equal(one, two)
    assert copy.defaults == pipe.defaults


def test_progress_counts_every_step_once(single):
    seen = []
    single(PROMPT, steps=6, callback=lambda done, steps: seen.append((done, steps)))
    assert [steps for _, steps in seen] == [6] * len(seen)
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})
    assert seen[-1][0] == 6


def test_an_interruption_between_chunks_leaves_the_pipeline_usable(single):
    def interrupt(done, steps):
        raise KeyboardInterrupt

    before = single(PROMPT, seed=1, output="latent").images
    with pytest.raises(KeyboardInterrupt):
        single(PROMPT, seed=1, callback=interrupt)
    assert np.array_equal(before, single(PROMPT, seed=1, output="latent").images)


def test_eta_is_the_fresh_noise_of_ddim(single):
    """None and 0 are one program; 1 draws, whatever the batch, and is written down."""
    way = {"sampler": "ddim", "steps": 5, "guidance_scale": 4.0, "output": "latent"}
    plain = single(PROMPT, seed=1, **way)
    before = single.stages.compilations
    zero = single(PROMPT, seed=1, eta=0.0, **way)
    assert single.stages.compilations == before
    np.testing.assert_array_equal(zero.images, plain.images)
    one = single(PROMPT, seed=1, eta=1.0, **way)
    assert np.abs(one.images - plain.images).max() > 0.1
    both = single([PROMPT] * 2, seed=[7, 1], eta=1.0, **way)
    np.testing.assert_allclose(both.images[1], one.images[0], rtol=1e-5, atol=1e-5)
    assert one.request[0].to_metadata()["eta"] == 1.0
    described = single(PROMPT, seed=1, **{**way, "sampler": "ddim:eta=1"})
    np.testing.assert_array_equal(described.images, one.images)
    assert "eta" not in plain.request[0].to_metadata()


def test_samplers_take_options(single):
    way = {"seed": 1, "steps": 4, "output": "latent"}
    plain, off = (single(PROMPT, sampler=s, **way).images for s in ("heun", "heun:s_churn=0"))
    np.testing.assert_array_equal(off, plain)
    churned = single(PROMPT, sampler="heun:churn=2", **way)
    assert churned.request.sampler == "heun:s_churn=2"
    assert np.isfinite(churned.images).all()
    assert np.abs(churned.images - plain).max() > 0.1
    assert single.nfe(churned.request) == 2 * 7


def test_cut_prompts_are_told(single):
    with pytest.warns(UserWarning, match="truncated, 40 tokens are missing from the end of 'star"):
        single("star " * 200, steps=1)


def test_a_closed_vocabulary_warns_once_of_all_words_that_it_lacks(tmp_path):
    folder = tiny.write_tiny(tmp_path / "tiny", tiny.DEFAULTS | {"closed_vocabulary": True})
    pipe = tiny.first_devices(jaxdiff.load(folder), 1)
    pipe("a (large:1.2) blue star above a green square AND a small red circle", steps=1)
    prompts = ["a castle above a (dragon:1.3)", "a red castle"]
    with pytest.warns(UserWarning, match="not trained on 'castle', 'dragon'; it knows") as caught:
        pipe(prompts, steps=1)
    (warning,) = caught
    assert str(warning.message).endswith(
        "it knows above, blue, circle, green, large, red, small, square, star"
    )
    with pytest.warns(UserWarning, match="not trained on '🎈'; it knows"):
        pipe("a red star 🎈!", steps=1)
    with pytest.warns(UserWarning, match="not trained on 'fog'"):
        pipe("a red star", negative_prompt="fog", guidance_scale=2.0, steps=1)


def test_pil_images(single):
    (image,) = single(PROMPT).images
    assert (image.size, image.mode) == ((16, 16), "RGB")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"output": "jpeg"}, r"^output: got 'jpeg'"),
        ({"sampler": "dim"}, r"^sampler: got 'dim', .*'ddim'"),
        ({"sampler": "ddim", "eta": 1.5}, r"^eta: got 1.5"),
        ({"sampler": "euler", "eta": 0.5}, r"^eta: got 0.5 with sampler 'euler', expected .*ddim"),
        ({"timestep_spacing": "karas"}, r"^timestep_spacing: got 'karas', .*'karras'"),
        ({"steps": 0}, r"^steps: got 0"),
        ({"guidance_scale": float("nan")}, r"^guidance_scale: got nan"),
        ({"guidance_scale": [1.0, 2.0, 3.0], "seed": [1, 2]}, r"^seed: got 2 entries.*1 or 3"),
        ({"seed": -1}, r"^seed: got -1"),
        ({"height": 17}, r"^height: got 17, expected a multiple of 2 such as 16 or 18"),
        ({"latents": np.zeros((1, 4, 8, 4))}, r"^latents: got shape \(1, 4, 8, 4\), expected"),
        ({"batch_size": 0}, r"^batch_size: got 0"),
    ],
)
def test_bad_input_is_one_sentence(single, options, message):
    with pytest.raises(InputError, match=message):
        single(PROMPT, **options)


def test_no_prompt(single):
    with pytest.raises(InputError, match=r"^prompt: got nothing, expected entries"):
        single([])
    with pytest.raises(InputError, match=r"^seed: got nothing, expected entries"):
        single(PROMPT, seed=[])


@pytest.mark.slow
def test_a_single_file_draws_what_its_folder_draws(tmp_path):
    components = originals.components("sd1", words=49408)
    path = tmp_path / "model.safetensors"
    originals.write_safetensors(path, originals.original_tensors("sd1", components))
    one = jaxdiff.load(path)
    parts = dataclasses.replace(one.parts, components=components)
    write_pipeline(tmp_path / "folder", parts)
    two = jaxdiff.load(tmp_path / "folder")
    options = {"height": 32, "width": 32, "steps": 2, "guidance_scale": 3.0, "output": "latent"}
    first, second = (first_devices(p, 1)("a cat!", **options).images for p in (one, two))
    assert np.isfinite(first).all()
    np.testing.assert_array_equal(first, second)
