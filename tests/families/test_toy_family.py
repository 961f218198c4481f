"""A family of another network, text joining and extra is data and one network: nothing else.

Nor is one of class labels without text on a flow, or one of pixels with a masked text encoder.
"""

import dataclasses
import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx
from PIL import Image

import jaxdiff
from jaxdiff.checkpoints import model_registry
from jaxdiff.checkpoints.configs import from_diffusers, from_transformers
from jaxdiff.checkpoints.pipelines import read_pipeline, write_pipeline
from jaxdiff.core.errors import InputError
from jaxdiff.core.validate import one_of
from jaxdiff.diffusion.schedules import FlowSchedule, VPSchedule
from jaxdiff.experiments.base_model import load_base_model
from jaxdiff.experiments.cache_latents import codec_folder
from jaxdiff.experiments.cache_texts import load_text_encoders
from jaxdiff.experiments.latent_cache import check_latent_cache
from jaxdiff.experiments.sample_grid import make_sampler, sampling_inputs
from jaxdiff.experiments.train import wire
from jaxdiff.experiments.training_methods import make_partition, make_training_method
from jaxdiff.families import registry
from jaxdiff.families.base import Family, TextEncoder, join_tokens
from jaxdiff.families.extras import Extra, Option
from jaxdiff.families.options import accepted_options
from jaxdiff.families.stable_diffusion import SD
from jaxdiff.families.text_outputs import mask_columns
from jaxdiff.generation.prompt_file import PromptSpec, make_jobs, read_prompt_file
from jaxdiff.generation.runner import Runner
from jaxdiff.models.build import param_dict
from jaxdiff.models.clip import CLIPTextModel
from jaxdiff.models.network_adapter import NetworkAdapter
from jaxdiff.models.text_encoder import TextFeatures
from jaxdiff.nn.layers import LayerFactory
from jaxdiff.parallel.mesh import sampling_mesh
from jaxdiff.parallel.sharding import ANY, infer_shardings
from jaxdiff.pipeline.defaults import Defaults
from jaxdiff.pipeline.on_mesh import OnMesh
from jaxdiff.pipeline.request import resolve
from jaxdiff.planning import published_models
from jaxdiff.planning.sampled_model import SamplingOptions, sampled_model
from jaxdiff.planning.sampling_programs import place_shapes, trace_loop
from jaxdiff.training.config import DataConfig, DiffusionObjective, TrainConfig
from jaxdiff.training.objectives.diffusion import Frozen, LatentDiffusion, diffusion_task


@dataclasses.dataclass(frozen=True, kw_only=True)
class ToyConfig:
    """The fields of the toy network's config.json."""

    sample_size: int = 8
    in_channels: int = 4
    out_channels: int = 4
    width: int = 8

    @property
    def channels(self):
        """Channels of what goes in and of the prediction."""
        return self.in_channels, self.out_channels


class ToyNetwork(nnx.Module):
    """Noisy latents and an embedding of the conditioning, mixed pixel by pixel."""

    projections = ()  # names of the layers that embed, each with the width of its input

    def __init__(
        self,
        config,
        *,
        dtype=jnp.float32,
        param_dtype=jnp.float32,
        attention="auto",
        remat="none",
        rngs,
    ):
        layers = LayerFactory(
            rngs=rngs, dtype=dtype, param_dtype=param_dtype, attention=attention, remat=remat
        )
        self.config, self.dtype = config, dtype
        self.proj_in = layers.linear(config.in_channels, config.width)
        for name, width in self.projections:
            setattr(self, name, layers.linear(width, config.width))
        self.proj_out = layers.linear(config.width, config.out_channels)

    def mix(self, x, t, embedding):
        """The output for latents x (b, h, w, c), times (b,) and embeddings (b, d)."""
        hidden = self.proj_in(x) + embedding[:, None, None] + jnp.sin(t)[:, None, None, None]
        return self.proj_out(jnp.tanh(hidden))


class ToyTransformer(ToyNetwork):
    """The mean of text tokens and an embedded style."""

    projections = (("text_proj", 8), ("style_proj", 1))

    def __call__(self, x, t, tokens, style):
        """The output for latents x (b, h, w, c), tokens (b, n, d) and styles (b, 1)."""
        return self.mix(x, t, self.text_proj(tokens).mean(axis=1) + self.style_proj(style))


class ToyAdapter(NetworkAdapter):
    """How the toy network is called."""

    sharding_rules = ANY
    unperturbable = "a toy"

    def conditioning_shapes(self, size, tokens):
        """The conditioning of one stream of one image."""
        del size
        shapes = {"tokens": (tokens, self.module.config.width), "style": (1,)}
        return {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}


@dataclasses.dataclass(frozen=True)
class Style(Extra):
    """The number of a style, for the streams of the prompt."""

    argument = "style"
    options = {"style": Option(int | None, 0, 0, 9)}  # noqa: RUF012

    def of_request(self, inputs):
        """The style where there is a prompt, else 0."""
        styles = np.array([options.get("style", 0) for options in inputs.options], np.float32)
        return inputs.for_streams(styles[:, None]) * np.array(inputs.prompted)[:, None]

    def of_batch(self, batch, dropped):
        """No data have styles: 0."""
        return jnp.zeros((len(batch["image"]), 1))


TOY = Family(
    name="Toy",
    network="transformer",
    network_class=ToyTransformer,
    adapter=ToyAdapter,
    text_encoders=(
        TextEncoder(),
        TextEncoder(component="text_encoder_2", tokenizer="tokenizer_2", layer="penultimate"),
    ),
    join=join_tokens,
    states_argument="tokens",
    extras=(Style(),),
)


NAMES = ("circle", "square", "star")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LabelConfig(ToyConfig):
    """The fields of the class-conditional network's config.json."""

    num_classes: int = len(NAMES)


class LabelTransformer(ToyNetwork):
    """An embedded class label."""

    projections = (("class_proj", len(NAMES) + 1),)

    def __call__(self, x, t, class_labels):
        """The output for latents x (b, h, w, c), times and class labels (b,)."""
        one_hot = jax.nn.one_hot(class_labels, self.config.num_classes + 1)
        return self.mix(x, t, self.class_proj(one_hot))


class LabelAdapter(ToyAdapter):
    """How the class-conditional network is called."""

    def conditioning_shapes(self, size, tokens):
        """The conditioning of one stream of one image."""
        del size, tokens
        return {"class_labels": jax.ShapeDtypeStruct((), jnp.int32)}


def label_of(text):
    """The class that a prompt names, by its name or number; no text is no class."""
    if not text:
        return len(NAMES)
    numbers = {name: i for i, name in enumerate(NAMES)} | {str(i): i for i in range(len(NAMES))}
    return numbers[one_of("prompt", text, numbers)]


@dataclasses.dataclass(frozen=True)
class ClassLabel(Extra):
    """The class of an image: that of its prompt, or the option `class_label`."""

    argument = "class_labels"
    reads_prompt = True
    options = {"class_label": Option(int | None, None, 0, len(NAMES) - 1)}  # noqa: RUF012

    def check(self, settings, texts):
        """InputError for a prompt that names no class, or two classes."""
        labels = [label_of(text) for text in texts]
        if "class_label" in settings and labels[0] != len(NAMES):
            raise InputError(f"class_label: got one besides the prompt {texts[0]!r}, expected one")

    def of_request(self, inputs):
        """The option for the streams of the prompt, else the class of what each stream reads."""
        rows = [
            [
                options["class_label"] if own and "class_label" in options else label_of(text)
                for own, text in zip(inputs.prompted, texts, strict=True)
            ]
            for options, texts in zip(inputs.options, inputs.texts, strict=True)
        ]
        return np.array(rows, np.int32)

    def columns(self, captions):
        """The classes that captions name."""
        return {"class_labels": np.array([label_of(text) for text in captions], np.int32)}

    def of_batch(self, batch, dropped):
        """The class of each caption, none where it is dropped."""
        return jnp.where(dropped, len(NAMES), batch["class_labels"])


LABELS = Family(
    name="Labels",
    network="transformer",
    network_class=LabelTransformer,
    adapter=LabelAdapter,
    text_encoders=(),
    extras=(ClassLabel(),),
    defaults={"guidance_scale": 4.0, "steps": 2},
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PixelTextConfig:
    """The fields of the pixel family's text encoder."""

    vocab_size: int = 560
    hidden_size: int = 8


class PixelText(nnx.Module):
    """A text encoder that says where its text ends: at the last token that is not padding."""

    token_embedding = "proj.kernel"

    def __init__(
        self, config, *, dtype=jnp.float32, param_dtype=jnp.float32, attention="auto", rngs
    ):
        layers = LayerFactory(rngs=rngs, dtype=dtype, param_dtype=param_dtype, attention=attention)
        self.config = config
        self.proj = layers.linear(config.vocab_size, config.hidden_size)

    def features(self, ids, skip=0):
        """States, and the mask of tokens up to the first end token, the last of the vocabulary."""
        del skip
        ends = jnp.cumsum(ids == self.config.vocab_size - 1, axis=1)
        states = self.proj(jax.nn.one_hot(ids, self.config.vocab_size))
        return TextFeatures(states, mask=(ends == 0) | ((ends == 1) & jnp.roll(ends == 0, 1, 1)))

    def unused_parameters(self, layer, pooled):
        """All weights are used."""
        del layer, pooled
        return ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class PixelConfig(ToyConfig):
    """The fields of the pixel network's config.json."""

    sample_size: int = 16
    in_channels: int = 3
    out_channels: int = 3


class PixelNet(ToyNetwork):
    """The mean of the text tokens that the mask leaves."""

    projections = (("text_proj", 8),)

    def __call__(self, x, t, context, context_mask):
        """The output for images x (b, h, w, 3), states (b, n, d) and their mask (b, n)."""
        weights = context_mask.astype(context.dtype)
        mean = jnp.einsum("bnd,bn->bd", context, weights) / weights.sum(axis=1, keepdims=True)
        return self.mix(x, t, self.text_proj(mean))


class PixelAdapter(ToyAdapter):
    """How the pixel network is called."""

    def conditioning_shapes(self, size, tokens):
        """The conditioning of one stream of one image."""
        del size
        shape = tokens, self.module.config.width
        return {
            "context": jax.ShapeDtypeStruct(shape, jnp.float32),
            "context_mask": jax.ShapeDtypeStruct((tokens,), jnp.bool),
        }


LENGTH = 6  # tokens of a text; the tokenizer says 12
PIXELS = Family(
    name="Pixels",
    network="unet",
    network_class=PixelNet,
    adapter=PixelAdapter,
    latent_codec=None,
    text_encoders=(TextEncoder(length=LENGTH, mask="context_mask"),),
    schedule=lambda config: VPSchedule(beta_schedule="cosine"),
    prediction_type=lambda config: "v_prediction",
)
FAMILIES = {"ToyPipeline": TOY, "LabelsPipeline": LABELS, "PixelsPipeline": PIXELS}
CLASSES = (
    ("ToyTransformer2DModel", ToyTransformer, ToyConfig, None),
    ("LabelTransformer2DModel", LabelTransformer, LabelConfig, None),
    ("PixelNet2DModel", PixelNet, PixelConfig, None),
    ("PixelTextModel", PixelText, PixelTextConfig, "pixel_text"),
)
PROMPT = "a small red circle"


@pytest.fixture(scope="module", autouse=True)
def registered():
    """The families and their networks, as a package of a user would register them."""
    with pytest.MonkeyPatch.context() as patch:
        for name, module, config, model_type in CLASSES:
            read = from_diffusers if model_type is None else from_transformers
            kind = model_registry.ModelClass(
                name=name,
                module=module,
                configs=partial(model_registry.single_config, read, config),
                model_type=model_type,
            )
            patch.setitem(model_registry.MODEL_CLASSES, name, kind)
        for name, family in FAMILIES.items():
            patch.setitem(registry.DETECT, name, lambda *_, family=family, source: family)
        patch.setattr(registry, "FAMILIES", [*registry.FAMILIES, *FAMILIES.values()])
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A pipeline folder of the family."""
    folder = tmp_path_factory.mktemp("toy")
    plain = read_pipeline(tiny.write_tiny(folder / "sd"))
    text = plain.components["text_encoder"].module.config
    components = {
        "transformer": tiny.random_component(ToyTransformer, ToyConfig(), seed=7),
        "vae": plain.components["vae"],
        "text_encoder": plain.components["text_encoder"],
        "text_encoder_2": tiny.random_component(CLIPTextModel, text, seed=8),
    }
    files = plain.tokenizers["tokenizer"]
    parts = dataclasses.replace(
        plain,
        class_name="ToyPipeline",
        components=components,
        tokenizers={"tokenizer": files, "tokenizer_2": files},
        absent=(),
    )
    write_pipeline(folder / "toy", parts)
    return folder / "toy"


@pytest.fixture(scope="module")
def pipe(folder):
    return tiny.first_devices(jaxdiff.load(folder, dtype="float32"), 1)


def test_it_generates(pipe):
    """One step from pure noise, by hand: x0 = alpha x - sigma v."""
    noise = np.random.default_rng(0).normal(size=(1, 8, 8, 4)).astype(np.float32)
    options = {"latents": noise, "steps": 1, "timestep_spacing": "trailing", "output": "latent"}
    out = pipe(PROMPT, prompt_2="a blue star", guidance="none", style=3, **options)
    states = []
    for i, text in enumerate((PROMPT, "a blue star")):
        ids = pipe.tokenizer(text, padding="max_length", truncation=True)["input_ids"]
        features = jax.jit(pipe.text_encoders[i].features)(jnp.asarray([ids]))
        states.append((features.last, features.penultimate)[i])
    tokens = jnp.concatenate(states, axis=1)
    v = pipe.transformer(jnp.asarray(noise), jnp.array([999.0]), tokens, jnp.array([[3.0]]))
    alpha, sigma = (float(x[0]) for x in pipe.schedule.alpha_sigma(jnp.array([999])))
    np.testing.assert_allclose(out.images, alpha * noise - sigma * np.asarray(v), atol=1e-5)
    assert out.request[0].to_metadata()["style"] == 3
    assert "Transformer" in repr(pipe)


def test_its_option_is_checked_and_other_families_refuse_it(pipe):
    with pytest.raises(InputError, match="style: got 12, expected a number from 0 to 9"):
        pipe(PROMPT, style=12)
    with pytest.raises(InputError, match="style: got 3, expected none for Stable Diffusion 1"):
        accepted_options(SD, {"style": 3})
    with pytest.raises(InputError, match=r"target_size: got \(1, 2\), expected none for Toy"):
        pipe(PROMPT, target_size=(1, 2))


def written(folder, name, **components):
    """A pipeline folder of the family of a pipeline class, with these components."""
    plain = read_pipeline(tiny.write_tiny(folder / "sd"))
    kept = {"vae": plain.components["vae"]} if FAMILIES[name].latent_codec else {}
    flow = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}
    parts = dataclasses.replace(
        plain,
        class_name=name,
        components=kept | components,
        scheduler=flow if name == "LabelsPipeline" else plain.scheduler,
        tokenizers=plain.tokenizers if FAMILIES[name].text_encoders else {},
        absent=(),
        defaults={},
    )
    write_pipeline(folder / "model", parts)
    return folder / "model"


@pytest.fixture(scope="module")
def labels_folder(tmp_path_factory):
    network = tiny.random_component(LabelTransformer, LabelConfig(), seed=9)
    return written(tmp_path_factory.mktemp("labels"), "LabelsPipeline", transformer=network)


@pytest.fixture(scope="module")
def labels(labels_folder):
    return tiny.first_devices(jaxdiff.load(labels_folder, dtype="float32"), 1)


@pytest.fixture(scope="module")
def pixels_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pixels")
    vocab = read_pipeline(tiny.write_tiny(folder / "sd")).components["text_encoder"].module.config
    text = PixelTextConfig(vocab_size=vocab.vocab_size)
    network = tiny.random_component(PixelNet, PixelConfig(), seed=10)
    encoder = tiny.random_component(PixelText, text, seed=11)
    return written(folder, "PixelsPipeline", unet=network, text_encoder=encoder)


@pytest.fixture(scope="module")
def pixels(pixels_folder):
    return tiny.first_devices(jaxdiff.load(pixels_folder, dtype="float32"), 1)


def test_classes_are_generated(labels):
    """One guided step of a flow from pure noise, by hand: x0 = noise - v."""
    assert (labels.defaults.guidance_scale, labels.defaults.steps) == (4.0, 2)
    assert isinstance(labels.schedule, FlowSchedule)
    noise = np.random.default_rng(0).normal(size=(3, 8, 8, 4)).astype(np.float32)
    options = {"latents": noise, "steps": 1, "guidance_scale": 3.0, "output": "latent"}
    out = labels(["star", "1", ""], **options)

    def v(numbers):
        return np.asarray(
            labels.transformer(jnp.asarray(noise), jnp.full(3, 1000.0), jnp.array(numbers))
        )

    null = v([3, 3, 3])
    want = noise - (null + 3 * (v([2, 1, 3]) - null))
    np.testing.assert_allclose(out.images, want, atol=1e-5)
    same = labels("", class_label=[2, 1, None], **options)
    np.testing.assert_array_equal(same.images, out.images)
    assert same.request[0].to_metadata()["class_label"] == 2
    assert labels("star").images[0].size == (16, 16)


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ("a dog", {}, "prompt: got 'a dog', expected one of circle"),
        ("star", {"negative_prompt": "dog"}, "prompt: got 'dog', expected one of"),
        ("star", {"class_label": 1}, "class_label: got one besides the prompt"),
        ("star", {"clip_skip": 1}, "clip_skip: got 1, expected none for Labels"),
        ("star", {"prompt_2": "a"}, "prompt_2: got 'a', expected none"),
        (["star", ""], {"class_label": [0, 1, 2]}, "prompt: got 2 entries, expected 1 or 3"),
    ],
)
def test_what_no_class_label_is(labels, prompt, options, message):
    with pytest.raises(InputError, match=message):
        labels(prompt, **options)


def test_a_family_that_reads_nothing_takes_no_prompt():
    bare = dataclasses.replace(LABELS, extras=())
    defaults = Defaults(sampler="euler", height=16, width=16)
    resolve(defaults, "", family=bare, vae_scale_factor=2)
    with pytest.raises(InputError, match="prompt: got 'star', expected none for Labels"):
        resolve(defaults, "star", family=bare, vae_scale_factor=2)


def test_lines_of_a_file_name_classes(labels, tmp_path):
    """By the prompt or by the option; images of several classes are one batch."""
    file = tmp_path / "jobs.jsonl"
    rows = [{"prompt": "star"}, {"prompt": "", "class_label": 1}]
    file.write_text("\n".join(map(json.dumps, rows)))
    jobs = make_jobs(read_prompt_file(file), PromptSpec(prompt="", steps=1), numbered=True)
    runner = Runner(pipe=labels, options={}, settings={"model": "labels"}, output=tmp_path / "out")
    plan = runner.plan(jobs, PromptSpec(prompt=""))
    counts = []
    assert plan[0].request.batch_key == plan[1].request.batch_key
    quiet = {"on_progress": lambda _: None}
    runner.generate(plan, (), batch_size=8, on_images=counts.append, **quiet)
    assert counts == [1, 1]
    for planned, prompt in zip(plan, ("star", "square"), strict=True):
        with Image.open(planned.path) as image:
            want = labels(prompt, steps=1, output="numpy").images[0]
            np.testing.assert_array_equal(np.asarray(image), want)
    file.write_text('{"prompt": "", "class_lable": 1}')
    with pytest.raises(InputError, match=r"field: got 'class_lable', expected .*class_label"):
        read_prompt_file(file)


def test_pixels_are_generated(pixels):
    """One step from pure noise, by hand; a text is its first tokens, its padding is masked."""
    assert not hasattr(pixels, "vae")
    noise = np.random.default_rng(0).normal(size=(2, 16, 16, 3)).astype(np.float32)
    options = {"latents": noise, "steps": 1, "timestep_spacing": "trailing", "guidance": "none"}
    texts = ["a red star", "a"]
    out = pixels(texts, output="latent", **options)
    ids = pixels.tokenizer(texts, padding="max_length", truncation=True)["input_ids"]
    features = pixels.text_encoder.features(jnp.asarray(ids))
    assert features.mask.shape == (2, LENGTH)
    assert features.mask.sum(axis=1).tolist() == [5, 3]
    inputs = jnp.asarray(noise), jnp.full(2, 999.0)
    v = np.asarray(pixels.unet(*inputs, features.last, features.mask))
    alpha, sigma = (float(x[0]) for x in pixels.schedule.alpha_sigma(jnp.array([999])))
    np.testing.assert_allclose(out.images, alpha * noise - sigma * v, atol=1e-5)
    want = np.round(np.clip(out.images / 2 + 0.5, 0, 1) * 255)
    np.testing.assert_array_equal(pixels(texts, output="numpy", **options).images, want)
    np.testing.assert_array_equal(pixels.decode_latents(out.images), want)


def test_pixels_start_from_images(pixels):
    """What a mask keeps is the image itself; no noise changes nothing of an image in [-1, 1]."""
    rng = np.random.default_rng(1)
    image = rng.integers(0, 256, (16, 16, 3)).astype(np.uint8)
    mask = np.zeros((16, 16), np.uint8)
    mask[:8] = 255
    options = {"image": image, "steps": 2, "output": "numpy"}
    kept = pixels(PROMPT, mask=mask, **options).images[0]
    np.testing.assert_array_equal(kept[8:], image[8:])
    assert np.any(kept[:8] != image[:8])
    half = pixels(PROMPT, strength=0.5, **options)
    floats = {**options, "image": image / np.float32(127.5) - 1}
    np.testing.assert_array_equal(pixels(PROMPT, strength=0.5, **floats).images, half.images)
    seen = pixels(PROMPT, steps=2, intermediate_steps=[1], output="latent")
    assert seen.intermediates.x0.shape == (1, 1, 16, 16, 3)


def test_pixels_have_no_latents_to_cache(pixels_folder, tmp_path):
    with pytest.raises(InputError, match=r"vae: got .*, which works on pixels, expected"):
        codec_folder(pixels_folder)
    base = load_base_model(objective(pixels_folder))
    data, partition = DataConfig(kind="latents", path=str(tmp_path)), make_partition(base, None)
    with pytest.raises(InputError, match=r"data\.kind: got latents for Pixels, which works on"):
        check_latent_cache(data, base, partition)
    encoders = load_text_encoders(pixels_folder, jnp.float32)
    assert set(mask_columns(encoders.family)) == {"text_encoder"}


def objective(folder):
    return DiffusionObjective(pipeline=str(folder))


@pytest.mark.parametrize("name", ["labels_folder", "pixels_folder"])
def test_others_are_trained_and_sampled(name, request):
    """One step moves all weights of the network; a sample is what the pipeline generates."""
    folder = request.getfixturevalue(name)
    base = load_base_model(objective(folder))
    method = make_training_method(base, jnp.float32, None)
    partition, tokenizer = method.partition, method.caption_tokenizer
    task = diffusion_task(base.objective, partition)
    frozen = Frozen(
        {each: base.host_weights(each) for each in partition.frozen}, base.null_ids(tokenizer)
    )
    captions = ["star", "circle", "square", "star"]
    side = 16
    images = np.random.default_rng(1).uniform(-1, 1, (4, side, side, 3)).astype(np.float32)
    batch = {"image": images} | tokenizer(captions)
    params, frozen, batch = jax.tree.map(jnp.asarray, (dict(task.init(0)), frozen, batch))
    (loss, metrics), slopes = jax.jit(jax.value_and_grad(task.loss, has_aux=True))(
        params, frozen, batch, jax.random.key(0)
    )
    assert np.isfinite(loss)
    assert {path for path, slope in slopes.items() if np.any(slope)} == set(params)
    if name == "pixels_folder":
        np.testing.assert_allclose(metrics["latent_std"], images.std(), rtol=1e-5)
    model = LatentDiffusion(partition, base.objective.prediction_type)
    generate = make_sampler(model, base.objective.schedule, steps=2, guidance_scale=2.0)
    inputs = tokenizer(captions) | sampling_inputs(base, side, 4)
    own = base.host_weights(base.family.network)
    found = jax.jit(generate)(*jax.tree.map(jnp.asarray, (own, frozen, inputs)))
    pipe = request.getfixturevalue(name.removesuffix("_folder"))
    options = {"sampler": "ddim", "timestep_spacing": "trailing", "steps": 2, "guidance_scale": 2.0}
    out = pipe(captions, latents=inputs["noise"], output="latent", **options)
    want = pipe.codec.decode(pipe.codec.unscale(jnp.asarray(out.images)))
    np.testing.assert_allclose(found, want, atol=1e-4)


def test_it_is_trained(folder):
    base = load_base_model(objective(folder))
    method = make_training_method(base, jnp.float32, None)
    assert set(method.partition.shapes) == set(
        param_dict(base.abstract_networks("float32")["transformer"])
    )
    task = diffusion_task(base.objective, method.partition)
    frozen = Frozen(
        {name: base.host_weights(name) for name in method.partition.frozen},
        base.null_ids(method.caption_tokenizer),
    )
    images = np.random.default_rng(1).uniform(-1, 1, (4, 16, 16, 3)).astype(np.float32)
    batch = {"image": images} | method.caption_tokenizer([PROMPT] * 4)
    params, frozen, batch = jax.tree.map(jnp.asarray, (dict(task.init(0)), frozen, batch))
    (loss, _), slopes = jax.jit(jax.value_and_grad(task.loss, has_aux=True))(
        params, frozen, batch, jax.random.key(0)
    )
    assert np.isfinite(loss)
    moved = {path for path, slope in slopes.items() if np.any(slope)}
    assert moved == set(params) - {"style_proj.kernel"}  # whose input is 0


@pytest.mark.parametrize(
    ("name", "shape"),
    [("folder", (8, 8, 4)), ("labels_folder", (8, 8, 4)), ("pixels_folder", (16, 16, 3))],
)
def test_it_is_planned(name, shape, request):
    folder = request.getfixturevalue(name)
    options = SamplingOptions(plan=(), model=str(folder), dtype="float32")
    model = sampled_model(options)
    layout = OnMesh(sampling_mesh({}, jax.devices()[:1]))
    params = place_shapes(
        param_dict(model.network.module), lambda tree: infer_shardings(tree, layout.mesh)
    )
    traced = trace_loop(options, model, params, 2, layout)
    assert jax.tree.leaves(traced.out_info)[0].shape == (2, *shape)
    data = DataConfig(kind="folder", path=str(folder), resolution=16, bucket_multiple=16)
    config = TrainConfig(objective=objective(folder), data=data, batch_size=8, steps=1)
    planned = wire(config, published_models.PUBLISHED)
    key = jax.eval_shape(lambda: jax.random.key(0))
    loss, _ = jax.eval_shape(
        planned.task.loss, planned.task.shapes, planned.frozen, planned.batch(8), key
    )
    assert loss.shape == ()
