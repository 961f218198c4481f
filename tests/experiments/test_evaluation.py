"""What is measured of drawn pictures: right for perfect ones, the closed form for one picture."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_training
from captioned_images import caption, write_folder

from jaxdiff.checkpoints.clip_vision import read_image_processor
from jaxdiff.checkpoints.components import Component, read_component, write_component
from jaxdiff.checkpoints.embedded import EMBEDDED
from jaxdiff.core.errors import InputError
from jaxdiff.data.batches import normalize_images
from jaxdiff.data.tokenizer import tokenize
from jaxdiff.data.trained_tokenizer import train_tokenizer
from jaxdiff.experiments import evaluation
from jaxdiff.experiments.evaluation import make_evaluation
from jaxdiff.experiments.experiment import validation_batch
from jaxdiff.models.build import abstract, initialise, param_dict
from jaxdiff.models.clip import CLIPModel
from jaxdiff.models.clip_config import CLIPTextConfig, CLIPVisionConfig
from jaxdiff.models.unet.config import UNet2DConditionConfig
from jaxdiff.models.vae import AutoencoderKL, AutoencoderKLConfig
from jaxdiff.parallel.mesh import make_mesh
from jaxdiff.parallel.sharding import infer_shardings
from jaxdiff.samplers.base import per_sample_keys
from jaxdiff.samplers.sampling import initial_noise
from jaxdiff.scenes import dataset
from jaxdiff.scenes.judge import render_generator, standard_prompts
from jaxdiff.training.config import DataConfig, DiffusionObjective, TrainConfig

OBJECTIVE = DiffusionObjective(
    model=UNet2DConditionConfig(sample_size=8), vae="", text_encoder="", num_eval_images=20
)
CONFIG = TrainConfig(objective=OBJECTIVE, steps=1, batch_size=4)
VAE = abstract(AutoencoderKL, AutoencoderKLConfig())
prompts = functools.cache(standard_prompts)


@pytest.fixture(autouse=True, scope="module")
def once():
    """The prompts, and the drawings of all of them that every evaluation compares with."""
    with pytest.MonkeyPatch.context() as patch:
        rendered = functools.cache(evaluation._renderings)
        patch.setattr(evaluation, "_renderings", rendered)
        patch.setattr(dataset, "standard_prompts", prompts)
        yield


@functools.cache
def texts_of_ids():
    """The prompts by their ids, and the tokenizer that gives these."""
    texts = [prompt.text for prompt in prompts()]
    tokenizer = train_tokenizer(texts, 700, 32)
    ids = map(tuple, tokenize(tokenizer, texts).tolist())
    return dict(zip(ids, texts, strict=True)), tokenizer


def replaced(config=CONFIG, **fields):
    return dataclasses.replace(config, objective=dataclasses.replace(OBJECTIVE, **fields))


def texts_of(ids):
    return [texts_of_ids()[0][tuple(row)] for row in np.asarray(ids).tolist()]


def given_with(tokenizer):
    """What pictures of captions are drawn from."""

    def told(captions, images=None):
        noise = np.asarray(initial_noise(per_sample_keys(range(len(captions))), (8, 8, 4)))
        return {"ids": tokenize(tokenizer, captions), "noise": noise}

    return told


def told(captions, images=None):
    """As `told_with` the tokenizer of the prompts."""
    return given_with(texts_of_ids()[1])(captions)


def perfect(shown):
    """What the prompts ask for, other drawings than those of the reference."""
    ids = shown["ids"]
    drawn = render_generator(prompts())(texts_of(ids), list(range(900, 900 + len(ids))))
    return jnp.asarray(normalize_images(drawn))


def grey(shown):
    return jnp.full((len(shown["ids"]), 64, 64, 3), -0.2)


def features(folder, images):
    clip = read_component(folder, dtype=jnp.float32).module
    processor = read_image_processor(folder, clip.vision_model.config.image_size)
    seen = clip.vision_model(processor(jnp.asarray(images))).pooled
    seen = seen @ clip.visual_projection.kernel[...]
    return np.asarray(seen, np.float64)


def test_perfect_images_of_scenes_are_all_correct_and_near():
    evaluate = make_evaluation(CONFIG, told, VAE, {})
    asked = []

    def draw(shown):
        asked.append((texts_of(shown["ids"]), np.asarray(shown["noise"])))
        return perfect(shown)

    right = evaluate(draw, {})
    assert [len(texts) for texts, _ in asked] == [16, 16]
    noise = np.concatenate([noise for _, noise in asked])[:20]
    assert len({n.tobytes() for n in noise}) == 20
    assert asked[0][0] == [p.text for p in prompts()[::32][:16]]
    shares = {name: value for name, value in right.items() if name != "fid"}
    assert shares == dict.fromkeys(shares, 1.0)
    assert {"all_correct", "colour", "shape", "held_out_correct"} <= set(shares)
    wrong = evaluate(grey, {})
    assert wrong["all_correct"] == 0
    assert right["fid"] < wrong["fid"] / 3


@pytest.mark.slow
def test_one_image_over_and_over_has_no_covariance():
    """Then the distance is |m - c|^2 and the trace of what real pictures differ by."""
    found = make_evaluation(CONFIG, told, VAE, {})(grey, {})["fid"]
    texts = [prompt.text for prompt in prompts()]
    drawn = render_generator(prompts())(texts, list(range(len(texts))))
    real = features(EMBEDDED / "clip", normalize_images(drawn))
    point = features(EMBEDDED / "clip", grey({"ids": [0]}))
    expected = np.sum((real.mean(0) - point) ** 2) + np.trace(np.cov(real.T))
    np.testing.assert_allclose(found, expected, rtol=1e-4)


@pytest.fixture
def stored(tmp_path):
    """A training on pictures in a folder, and a CLIP in another."""
    write_folder(tmp_path / "in", 40)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 1}
    text = CLIPTextConfig(vocab_size=20, max_position_embeddings=4, **sizes)
    vision = CLIPVisionConfig(image_size=12, patch_size=4, **sizes)
    clip = Component(module=initialise(CLIPModel, text, vision, 4, seed=5))
    write_component(tmp_path / "export" / "clip", clip)
    data = DataConfig(
        kind="folder",
        path=str(tmp_path / "in"),
        resolution=12,
        bucket_multiple=4,
        cache_dir=str(tmp_path / "c"),
    )
    return dataclasses.replace(CONFIG, data=data), tmp_path / "export"


@pytest.mark.parametrize("field", ["clip", "text_encoder"])
def test_stored_images_are_compared_where_there_is_a_clip(stored, field):
    config, folder = stored
    config = replaced(config, **{field: str(folder)})
    tokenizer = train_tokenizer([caption(i) for i in range(40)], 560, 12)
    held_out = validation_batch(config, tokenizer)
    known = {row.tobytes() for row in held_out["ids"]}
    pictures = iter(np.random.default_rng(0).uniform(-1, 1, (2, 16, 12, 12, 3)).astype(np.float32))

    def draw(shown):
        assert {row.tobytes() for row in np.asarray(shown["ids"])} <= known
        return jnp.asarray(next(pictures))

    measures = make_evaluation(config, given_with(tokenizer), VAE, held_out)(draw, {})
    assert set(measures) == {"fid"}
    assert measures["fid"] > 0


def test_without_a_clip_stored_images_are_not_measured(stored):
    config, _ = stored
    assert make_evaluation(replaced(config, num_eval_images=None), told, VAE, {})(grey, {}) == {}
    with pytest.raises(InputError, match=r"num_eval_images: got 20 for data without a metric"):
        make_evaluation(config, told, VAE, {})


def test_counts(monkeypatch):
    assert make_evaluation(replaced(num_eval_images=0), told, VAE, {})(grey, {}) == {}
    monkeypatch.setattr(evaluation, "DEFAULT_EVAL_IMAGES", 2)
    seen = []
    make_evaluation(replaced(num_eval_images=None), told, VAE, {})(
        lambda shown: seen.extend(texts_of(shown["ids"])) or grey(shown), {}
    )
    assert len(set(seen)) == 2
    with pytest.raises(InputError, match="num_eval_images: got 1, expected 0 or 2 or more"):
        replaced(num_eval_images=1)
    with pytest.raises(
        InputError, match="eval_clip: got a, expected it left out with num_eval_images 0"
    ):
        replaced(num_eval_images=0, eval_clip="a")
    never = dataclasses.replace(CONFIG, sample_every=0)
    with pytest.raises(InputError, match=r"num_eval_images: got 20, .* with sample_every 0"):
        make_evaluation(never, told, VAE, {})
    assert make_evaluation(replaced(never, num_eval_images=None), told, VAE, {})(grey, {}) == {}


def test_held_out_latents_are_decoded_with_the_weights_on_the_mesh():
    """Each device has its share of the weights, and of the latents."""
    vae = initialise(AutoencoderKL, tiny_training.VAE, seed=0)
    table, mesh = param_dict(vae), make_mesh(data=1, fsdp=2, tensor=4)
    placed = jax.device_put(table, infer_shardings(table, mesh))
    z = np.random.default_rng(0).normal(size=(20, 2, 2, 2)).astype(np.float32)
    found = evaluation._decoded_images(vae, placed, {"mean": z})
    np.testing.assert_allclose(found, vae.decode(jnp.asarray(z)), rtol=1e-4, atol=1e-5)
