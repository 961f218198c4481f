"""Guidance rules and steering through the whole pipeline of a tiny model."""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx

from jaxdiff.checkpoints.jsonfiles import write_object
from jaxdiff.core.configs import to_mapping
from jaxdiff.core.errors import InputError
from jaxdiff.diffusion.denoising import NoiseLevel
from jaxdiff.guidance.classifier_guidance import log_prob_gradient, spherical
from jaxdiff.models.prompt_labels import PROMPT_LABELS
from jaxdiff.models.unet.module import UNet2DConditionModel
from jaxdiff.nn.embeddings import guidance_embedding
from jaxdiff.pipeline.pipeline import Pipeline
from jaxdiff.scenes.labels import ATTRIBUTES, GRAMMAR

PROMPT = "a small red circle"
SHARED = {"seed": 3, "steps": 4, "sampler": "ddim", "output": "latent"}


def latents(pipe, prompt=PROMPT, **options):
    return np.asarray(pipe(prompt, **{**SHARED, **options}).images)


def close(a, b, limit=2e-5):
    assert np.abs(a - b).max() < limit * np.abs(b).max()


def apart(a, b):
    assert np.abs(a - b).max() > 1e-3 * np.abs(b).max()


def pure_noise(pipe):
    """alpha and sigma of the noisiest level."""
    return (float(a[0]) for a in pipe.schedule.alpha_sigma(jnp.array([999])))


def other(pipe, seed=9, **components):
    """The model with another UNet, and on the same devices."""
    unet = tiny.random_component(UNet2DConditionModel, pipe.unet.config, seed=seed)
    parts = dataclasses.replace(
        pipe.parts, components={**pipe.parts.components, "unet": unet, **components}
    )
    return Pipeline(parts, name="other", devices=pipe.devices)


# Switched off, a rule is one that was there before.
SAME = [
    ("apg:eta=1", "cfg", {}),
    ("cfg+rescale:phi=0", "cfg", {}),
    ("cfg+interval", "cfg", {}),
    ("cfg+interval:hi=0", "none", {}),
    ("cfg+adaptive:cosine=2", "cfg", {}),
    ("pag:scale=0", "cfg", {}),
    ("cfg+clip-sample:limit=100000", "cfg", {}),
    ("cfg+schedule:curve=constant", "cfg", {}),
    ("negative", "cfg", {"negative_scale": 0.0}),
]


@pytest.mark.parametrize(("rule", "plain", "options"), SAME)
def test_a_rule_that_is_off_is_plain(single, rule, plain, options):
    close(latents(single, guidance=rule, **options), latents(single, guidance=plain), 1e-4)


@pytest.mark.parametrize(
    "rule",
    [
        "apg",
        "cfg-zero-star",
        "pag",
        "cfg+rescale",
        "cfg+interval:lo=1,hi=5",
        "cfg+schedule",
        "cfg+clip-sample",
    ],
)
def test_a_rule_that_is_on_is_not_plain(single, rule):
    apart(latents(single, guidance=rule), latents(single))


def test_three_streams_with_one_less_are_the_negative_prompt(single):
    options = {"negative_prompt": "a large blue star", "guidance_scale": 4.0}
    three = latents(single, guidance="negative", negative_scale=3.0, **options)
    close(three, latents(single, **options))


def test_numbers_of_a_rule_compile_nothing(single):
    single(PROMPT, guidance="cfg+rescale:phi=0.2+interval:lo=0.3,hi=5", **SHARED)
    before = single.stages.compilations
    single(PROMPT, guidance="cfg+rescale:phi=0.9+interval:lo=0.1,hi=2", **SHARED)
    assert single.stages.compilations == before


def test_prompts_joined_by_and(single):
    both = "a small red circle AND a large blue star:0.5"
    assert np.isfinite(latents(single, both)).all()
    close(latents(single, f"{PROMPT}:0.25 AND {PROMPT}:0.75"), latents(single))
    close(latents(single, f"{PROMPT} AND a large blue star:0"), latents(single))
    literal = latents(single, both, prompt_syntax=False)
    apart(latents(single, both), literal)
    # an image with one prompt beside one with two is what it is alone
    mixed = latents(single, [PROMPT, both], seed=[3, 3])
    close(mixed[0], latents(single)[0])
    close(mixed[1], latents(single, both)[0])


def test_a_weaker_model_guides(single):
    guide = other(single)
    single.set_guidance_model(guide)
    got = latents(single, guidance="autoguidance", guidance_scale=3.0)
    apart(got, latents(single, guidance="none"))
    close(
        latents(single, guidance="autoguidance", guidance_scale=1.0),
        latents(single, guidance="none"),
    )
    single.set_guidance_model(other(single, unet=single.parts.components["unet"]))
    same = latents(single, guidance="autoguidance", guidance_scale=7.0)
    close(same, latents(single, guidance="none"), 1e-4)
    single.set_guidance_model(None)
    with pytest.raises(InputError, match="guidance_model: got none, expected the weaker model"):
        latents(single, guidance="autoguidance")


def test_a_classifier_brings_how_prompts_name_its_labels(single, classifier, tmp_path):
    folder = shutil.copytree(classifier, tmp_path / "classifier")
    stored = folder / PROMPT_LABELS
    for change, message in (
        ({"layout": "mood"}, r"prompt_labels\.json: group: got 'mood'"),
        ({"relations": [["above", "above", "third"]]}, "place: got 'third'"),
        ({"relations": [["above", "above"]]}, "relations: got"),
        ({"kinds": ["size", "taste"]}, "group: got 'first_taste'"),
        ({"colour": "red"}, "field: got 'colour'"),
        ({"words": []}, "field: got 'words'"),
    ):
        write_object(stored, to_mapping(GRAMMAR) | change)
        with pytest.raises(InputError, match=message):
            single.load_classifier(folder)
    stored.unlink()
    single.load_classifier(folder)
    with pytest.raises(InputError, match="prompt: got 'a dog', expected words of the classifier"):
        single("a dog", classifier_scale=5.0, **SHARED)


def test_a_classifier_steers(single, classifier):
    single.load_classifier(classifier)
    close(latents(single, classifier_scale=0.0), latents(single), 1e-6)
    apart(latents(single, classifier_scale=5.0), latents(single))
    ancestral = {"sampler": "ddpm", "guidance": "none"}
    apart(latents(single, classifier_scale=5.0, **ancestral), latents(single, **ancestral))


def test_one_step_with_a_classifier_is_the_formula(single, classifier):
    """From the same noise, eps moves by -k sigma grad log p, and DDIM's x0 with it."""
    single.load_classifier(classifier)
    module, k = single._auxiliary.classifier, 3.0
    noise = np.random.default_rng(0).normal(size=(1, 8, 8, 4)).astype(np.float32)
    options = {"latents": noise, "steps": 1, "guidance": "none", "timesteps": "trailing"}
    moved = latents(single, classifier_scale=k, **options) - latents(single, **options)
    alpha, sigma = pure_noise(single)
    told = single._auxiliary.guidance_targets(single.resolve(PROMPT, classifier_scale=k)).classifier

    def log_prob(x, level):
        logits = module(x, jnp.full(1, 999.0))
        return ATTRIBUTES.log_prob(logits, jnp.asarray(told.targets), jnp.asarray(told.known))

    one = jnp.ones(1)
    level = NoiseLevel(
        999 * one, alpha * one, sigma * one, one, one, sigma / alpha * one, one.astype(bool)
    )
    gradient = jax.jit(lambda x: log_prob_gradient(log_prob, x, level))(noise)
    close(moved, np.asarray(k * sigma**2 / alpha * gradient), 1e-3)


def test_one_step_with_clip_is_the_formula(single, clip):
    """From the same noise, x0 moves by -k sigma^2 / alpha times the gradient of CLIP's distance."""
    single.load_clip(clip)
    module, lens = single._auxiliary.clip, single._auxiliary.image_processor
    noise = np.random.default_rng(1).normal(size=(1, 8, 8, 4)).astype(np.float32)
    options = {"latents": noise, "steps": 1, "guidance": "none", "timesteps": "trailing"}
    wanted = single._auxiliary.guidance_targets(single.resolve(PROMPT, clip_scale=1.0))
    text = jnp.asarray(wanted.clip.text)

    alpha, sigma = pure_noise(single)
    ids = single.tokenizer(PROMPT, padding="max_length", truncation=True)["input_ids"]
    context = single.text_encoder(jnp.asarray([ids]))

    @jax.jit
    @jax.grad
    def gradient(x):
        v = single.unet(x, jnp.array([999.0]), context)
        pictures = single.vae.decode(single.vae.unscale(alpha * x - sigma * v))
        return spherical(module.image_embeds(lens(pictures)), text)[0]

    moved = latents(single, clip_scale=2.0, **options) - latents(single, **options)
    close(moved, np.asarray(-2 * sigma**2 / alpha * gradient(jnp.asarray(noise))), 1e-3)


def test_a_network_that_was_taught_guidance_is_told_the_scale(single):
    config = dataclasses.replace(single.unet.config, time_cond_proj_dim=16)
    unet = tiny.random_component(UNet2DConditionModel, config, seed=1)
    taught = other(single, unet=unet)
    assert taught.defaults.guidance == "none"
    low, high = (latents(taught, guidance_scale=w) for w in (1.0, 6.0))
    apart(low, high)
    with pytest.raises(InputError, match="guidance: got cfg, expected none"):
        latents(taught, guidance="cfg")
    # one step from pure noise by hand
    noise = np.random.default_rng(0).normal(size=(1, 8, 8, 4)).astype(np.float32)
    got = latents(taught, latents=noise, steps=1, guidance_scale=6.0, timestep_spacing="trailing")
    ids = taught.tokenizer(PROMPT, padding="max_length", truncation=True)["input_ids"]
    context = taught.text_encoder(jnp.asarray([ids]))
    told = guidance_embedding(jnp.array([6.0]), 16)
    v = nnx.jit(type(unet.module).__call__)(
        unet.module, jnp.asarray(noise), jnp.array([999.0]), context, timestep_cond=told
    )
    alpha, sigma = pure_noise(taught)
    close(got, alpha * noise - sigma * np.asarray(v), 1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"guidance": "cgf"}, "guidance: got 'cgf'"),
        ({"guidance": "cfg-pp", "sampler": "dpmpp-2m"}, "cfg-pp with sampler dpmpp-2m, expected"),
        (
            {"guidance": "cfg-pp", "guidance_scale": 3.0},
            r"guidance_scale \(with guidance cfg-pp\): got 3.0",
        ),
        (
            {"negative_scale": 2.0},
            "negative_scale: got it with guidance cfg, expected guidance negative",
        ),
        (
            {"guidance": "none", "negative_prompt": "b"},
            "^negative_prompt: got 'b' with guidance none, which reads none, expected no negative",
        ),
        (
            {"guidance": "none+rescale:phi=0.7", "negative_prompt": "b"},
            "expected no negative prompt, or guidance cfg, negative, apg",
        ),
        ({"guidance": "autoguidance", "negative_prompt": "b"}, "with guidance autoguidance, which"),
        ({"classifier_scale": -1.0}, "classifier_scale: got -1.0"),
        (
            {"guidance": "pag", "prompt": "a AND b"},
            "prompt: got 2 prompts joined by AND, expected 1 with",
        ),
    ],
)
def test_bad_input_is_one_sentence(single, options, message):
    with pytest.raises(InputError, match=message):
        latents(single, **options)


def test_what_is_not_there_is_told(pipe, single):
    bare = tiny.first_devices(pipe, 1)
    with pytest.raises(InputError, match="classifier: got none, expected the folder of one"):
        latents(bare, classifier_scale=1.0)
    with pytest.raises(InputError, match="clip: got none, expected the folder"):
        latents(bare, clip_scale=1.0)


def test_steering_reads_only_the_prompts_that_it_is_for(single, classifier):
    single.load_classifier(classifier)
    both = latents(single, [PROMPT, "zzz"], seed=[3, 3], classifier_scale=[5.0, None])
    close(both[0], latents(single, classifier_scale=5.0)[0])
    close(both[1], latents(single, "zzz")[0])
    with pytest.raises(InputError, match="expected words of the classifier's labels"):
        latents(single, "zzz", classifier_scale=5.0)
    with pytest.raises(InputError, match=r"classifier_scale: .* without AND"):
        latents(single, f"{PROMPT} AND NOT a star", classifier_scale=5.0)


def test_settings_say_what_guided(single):
    said = single.resolve(PROMPT, guidance="apg:eta=0.5", clip_scale=2.0)[0].to_metadata()
    assert (said["guidance"], said["clip_scale"]) == ("apg:eta=0.5", 2.0)
    assert "classifier_scale" not in said
