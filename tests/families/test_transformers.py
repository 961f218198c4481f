"""DiT and PixArt as families: generated, from images, trained from scratch and from a pipeline."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from captioned_images import write_folder
from PIL import Image

import jaxdiff
from jaxdiff.checkpoints.components import write_component
from jaxdiff.checkpoints.pipelines import read_pipeline, write_pipeline
from jaxdiff.checkpoints.tokenizers import write_tokenizer
from jaxdiff.checkpoints.weights import read_weights
from jaxdiff.cli import main
from jaxdiff.cli.train import parse
from jaxdiff.core.errors import InputError
from jaxdiff.diffusion.schedules import FlowSchedule
from jaxdiff.experiments.workdir import read_config, write_config
from jaxdiff.models.build import param_dict
from jaxdiff.models.dit.config import DiTTransformer2DConfig
from jaxdiff.models.dit.module import DiTTransformer2DModel
from jaxdiff.models.pixart.config import PixArtTransformer2DConfig
from jaxdiff.models.pixart.module import PixArtTransformer2DModel
from jaxdiff.models.unet.class_conditional import ClassConditionalUNet2DConfig
from jaxdiff.models.unet.config import UNet2DConditionConfig
from jaxdiff.training.config import (
    DataConfig,
    DiffusionObjective,
    LoRA,
    OptimiserConfig,
    TrainConfig,
    resume_identity,
)

NAMES = ("circle, disc", "square", "crane", "crane, bird", "small red star")
SIZES = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2, "sample_size": 8}
DIT = DiTTransformer2DConfig(**SIZES, out_channels=8, num_embeds_ada_norm=len(NAMES))
PIXART = PixArtTransformer2DConfig(
    **SIZES, cross_attention_dim=16, caption_channels=8, out_channels=4
)
DDIM = {"_class_name": "DDIMScheduler", "clip_sample": False, "num_train_timesteps": 1000}
FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 1.0}


def write(folder, class_name, network, scheduler, **options):
    """A pipeline folder with the other parts of a tiny model."""
    plain = read_pipeline(tiny.write_tiny(folder / "sd"))
    text = class_name == "PixArtCLIPPipeline"
    names = ("vae", "text_encoder") if text else ("vae",)
    parts = dataclasses.replace(
        plain,
        class_name=class_name,
        components={n: plain.components[n] for n in names} | {"transformer": network},
        scheduler=scheduler,
        tokenizers=plain.tokenizers if text else {},
        absent=(),
        defaults={},
        options=options,
    )
    write_pipeline(folder / "model", parts)
    return folder / "model"


@pytest.fixture(scope="module")
def dit_folder(tmp_path_factory):
    network = tiny.random_component(DiTTransformer2DModel, DIT, seed=7)
    labels = {str(i): name for i, name in enumerate(NAMES)}
    return write(tmp_path_factory.mktemp("dit"), "DiTPipeline", network, DDIM, id2label=labels)


@pytest.fixture(scope="module")
def dit(dit_folder):
    return tiny.first_devices(jaxdiff.load(dit_folder, dtype="float32"), 1)


@pytest.fixture(scope="module")
def sit(tmp_path_factory):
    """The same network as a flow."""
    network = tiny.random_component(DiTTransformer2DModel, DIT, seed=7)
    folder = write(tmp_path_factory.mktemp("sit"), "DiTPipeline", network, FLOW)
    return tiny.first_devices(jaxdiff.load(folder, dtype="float32"), 1)


@pytest.fixture(scope="module")
def pixart(tmp_path_factory):
    network = tiny.random_component(PixArtTransformer2DModel, PIXART, seed=8)
    folder = write(tmp_path_factory.mktemp("pixart"), "PixArtCLIPPipeline", network, FLOW)
    return tiny.first_devices(jaxdiff.load(folder, dtype="float32"), 1)


def noise(count, seed=0):
    return np.random.default_rng(seed).normal(size=(count, 8, 8, 4)).astype(np.float32)


def test_one_guided_step_by_hand(sit):
    """x0 = noise - v, where v is guided in three of four channels, as the code of DiT has it."""
    x, w = noise(2), 3.0
    options = {"latents": x, "steps": 1, "guidance_scale": w, "output": "latent"}

    def v(labels):
        out = sit.transformer(jnp.asarray(x), jnp.full(2, 1000.0), jnp.array(labels))
        return np.asarray(out[..., :4])  # without the learned variance

    null, cond = v([5, 5]), v([4, 1])
    guided = null + w * (cond - null)
    out = sit(["4", "1"], **options)
    np.testing.assert_allclose(out.images, x - guided, atol=5e-5)  # float32 of numbers up to 8
    three = np.concatenate([guided[..., :3], cond[..., 3:]], axis=-1)
    out = sit(["4", "1"], guidance="cfg:channels=3", **options)
    np.testing.assert_allclose(out.images, x - three, atol=5e-5)  # float32 of numbers up to 8
    assert isinstance(sit.schedule, FlowSchedule)


@pytest.mark.parametrize("guidance", ["cfg", "apg+interval:hi=3"])
def test_learned_variances_on_a_mesh(dit, dit_folder, guidance):
    """Of the sampler that reads them, images are the same on a mesh; they are not those of others.

    The network's random variances are not what noises of these levels have: images are large.
    """
    options = {"steps": 3, "output": "latent", "seed": 1, "guidance_scale": 2.0}
    options |= {"sampler": "ddpm:variance=learned_range", "guidance": guidance}
    got = dit("4", **options).images
    shared = jaxdiff.load(dit_folder, dtype="float32", mesh="fsdp=2")("4", **options).images
    largest = np.abs(got).max()
    np.testing.assert_allclose(shared, got, atol=1e-4 * largest)
    fixed = dit("4", **options | {"sampler": "ddpm"}).images
    assert np.abs(fixed - got).max() > 1e-3 * largest


def test_a_network_without_a_variance_has_none_to_read(pixart):
    with pytest.raises(InputError, match="variance: got learned for a network that learns no"):
        pixart.resolve("a star", sampler="ddpm:variance=learned")


def test_a_class_has_names_and_a_number(dit):
    assert (dit.defaults.guidance_scale, dit.defaults.steps) == (4.0, 50)
    options = {"steps": 2, "latents": noise(1), "output": "latent"}
    want = dit("4", **options).images
    for prompt in ("small red star", "Small Red Star "):
        np.testing.assert_array_equal(dit(prompt, **options).images, want)
    np.testing.assert_array_equal(dit("", class_label=4, **options).images, want)
    disc = dit("disc", **options).images
    np.testing.assert_array_equal(disc, dit("circle, disc", **options).images)
    np.testing.assert_array_equal(disc, dit("0", **options).images)
    assert np.abs(disc - want).max() > 1e-3
    negative = dit("0", negative_prompt="4", **options).images
    assert np.abs(negative - disc).max() > 1e-3


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ("cirle", {}, "prompt: got 'cirle', expected the name of a class or a number from 0 to 4"),
        ("cirle", {}, "did you mean 'circle'"),
        ("5", {}, "prompt: got '5', expected the name of a class or a number"),
        ("crane", {}, "prompt: got 'crane', the name of the classes 2 and 3, expected a number"),
        ("square", {"class_label": 1}, "class_label: got 1 besides the prompt 'square'"),
        ("", {"class_label": 5}, "class_label: got 5, expected a number from 0 to 4"),
        ("square", {"negative_prompt": "dog"}, "^negative_prompt: got 'dog', expected the name"),
        ("square", {"guidance": "pag"}, "guidance: got perturbed attention for a DiT"),
        ("square", {"height": 18}, "^height: got 18, expected a multiple of 4 such as 16"),
        ("square", {"width": 18}, "^width: got 18, expected a multiple of 4 such as 16"),
    ],
)
def test_what_is_refused(dit, prompt, options, message):
    with pytest.raises(InputError, match=message):
        dit(prompt, steps=1, **options)


def test_names_of_classes_are_saved(dit, tmp_path):
    dit.save(tmp_path / "saved")
    index = json.loads((tmp_path / "saved" / "model_index.json").read_text())
    assert index["id2label"] == {str(i): name for i, name in enumerate(NAMES)}
    assert index["transformer"] == ["diffusers", "DiTTransformer2DModel"]
    (tmp_path / "saved" / "model_index.json").write_text(
        json.dumps(index | {"id2label": {"0": "a"}})
    )
    with pytest.raises(InputError, match="id2label: got 1 names, expected one of each of 5"):
        jaxdiff.load(tmp_path / "saved")


def test_the_former_class_is_read(dit_folder, tmp_path):
    """As the published repositories name it, with fields of other models."""
    parts = read_pipeline(dit_folder)
    write_pipeline(tmp_path / "old", parts)
    index = json.loads((tmp_path / "old" / "model_index.json").read_text())
    index["transformer"] = ["diffusers", "Transformer2DModel"]
    (tmp_path / "old" / "model_index.json").write_text(json.dumps(index))
    file = tmp_path / "old" / "transformer" / "config.json"
    config = json.loads(file.read_text())
    del config["freq_shift"]
    absent = DiTTransformer2DConfig.ABSENT
    file.write_text(json.dumps(config | absent | {"_class_name": "Transformer2DModel"}))
    pipe = jaxdiff.load(tmp_path / "old", dtype="float32")
    assert pipe.transformer.config == DIT
    pipe.save(tmp_path / "new")
    jaxdiff.load(tmp_path / "new")
    file.write_text(json.dumps(config | {"cross_attention_dim": 8}))
    with pytest.raises(InputError, match="cross_attention_dim"):
        jaxdiff.load(tmp_path / "old")


@pytest.mark.parametrize("name", ["dit", "sit", "pixart"])
def test_images_are_changed_and_repainted(name, request):
    """What a mask keeps is the image's own; other sizes work as well."""
    pipe = request.getfixturevalue(name)
    prompt = "a small red circle" if name == "pixart" else "1"
    rng = np.random.default_rng(1)
    image = Image.fromarray(rng.integers(0, 256, (16, 24, 3)).astype(np.uint8))
    options = {"image": image, "steps": 4, "height": 16, "width": 24, "output": "latent"}
    changed = pipe(prompt, strength=0.5, **options).images
    assert changed.shape == (1, 8, 12, 4)
    assert np.isfinite(changed).all()
    mask = np.zeros((16, 24), np.uint8)
    mask[:8] = 255
    kept = pipe(prompt, mask=mask, **options).images[0]
    own = pipe.vae.scale(pipe.vae.encode(jnp.asarray(image, jnp.float32)[None] / 127.5 - 1)[0])[0]
    np.testing.assert_allclose(kept[4:], own[4:], atol=1e-4)
    assert np.abs(kept[:4] - own[:4]).max() > 1e-2


def test_pixart_attends_to_the_text(pixart):
    """One step of a flow by hand; another text gives another image."""
    x, texts = noise(2), ["a small red circle", "a large blue star"]
    out = pixart(texts, latents=x, steps=1, guidance="none", output="latent").images
    ids = pixart.tokenizer(texts, padding="max_length", truncation=True)["input_ids"]
    states = pixart.text_encoder.features(jnp.asarray(ids)).last
    v = pixart.transformer(jnp.asarray(x), jnp.full(2, 1000.0), states)
    np.testing.assert_allclose(out, x - np.asarray(v), atol=5e-5)  # float32 of numbers up to 8
    swapped = pixart(texts[::-1], latents=x, steps=1, guidance="none", output="latent").images
    assert np.abs(swapped - out).max() > 1e-3
    assert (pixart.defaults.guidance_scale, pixart.defaults.steps) == (4.5, 20)


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Folders of a VAE, a text encoder, and images whose captions are words or numbers."""
    folder = tmp_path_factory.mktemp("parts")
    plain = read_pipeline(tiny.write_tiny(folder / "sd"))
    write_component(folder / "vae", plain.components["vae"])
    (folder / "text").mkdir()
    write_component(folder / "text" / "text_encoder", plain.components["text_encoder"])
    (folder / "text" / "tokenizer").mkdir()
    write_tokenizer(folder / "text" / "tokenizer", plain.tokenizers["tokenizer"])
    write_folder(folder / "images", 24, sizes=((16, 16),))
    return folder


def training(parts, data=None, **fields):
    """Two steps on the images of `parts`, or on `data`."""
    images = DataConfig(
        kind="folder",
        path=str(parts / "images"),
        resolution=16,
        bucket_multiple=8,
        validation_size=2,
        cache_dir=str(parts / "cache"),
    )
    return TrainConfig(
        objective=DiffusionObjective(sample_steps=2, **fields),
        data=data or images,
        steps=2,
        batch_size=8,
        log_every=1,
        sample_every=2 if data is None else 0,
        checkpoint_every=2,
        tensorboard=False,
        optimiser=OptimiserConfig(warmup_steps=1),
    )


@pytest.mark.slow
@pytest.mark.usefixtures("standard_promotion")
def test_a_text_model_is_trained_from_scratch(parts, tmp_path):
    """From nothing to a folder that generates, whose network is no longer zero."""
    fields = {"model": PIXART, "vae": str(parts / "vae"), "text_encoder": str(parts / "text")}
    config = training(parts, **fields)
    result = jaxdiff.train(config, tmp_path / "run")
    assert result.step == 2
    assert (tmp_path / "run" / "samples").is_dir()
    pipe = jaxdiff.load(result.export)
    assert pipe.family.name == "PixArt with CLIP"
    assert np.abs(pipe.transformer.proj_out.kernel[...]).max() > 0
    assert pipe("a star", steps=2, output="numpy").images.shape == (1, 16, 16, 3)
    assert jaxdiff.train(config, tmp_path / "run").step == 2  # nothing is left to do
    tuned = training(parts, pipeline=str(result.export), trainable=LoRA(rank=2))
    tuned = dataclasses.replace(tuned, sample_every=0)
    result = jaxdiff.train(tuned, tmp_path / "lora")
    names = read_weights(next(result.export.glob("*.safetensors")))
    modules = {name.rpartition(".lora_")[0] for name in names}
    layers = ("to_q", "to_k", "to_v", "to_out.0")
    assert modules == {
        f"transformer.transformer_blocks.{block}.{attention}.{layer}"
        for block in range(PIXART.num_layers)
        for attention in ("attn1", "attn2")
        for layer in layers
    }


@pytest.mark.slow
@pytest.mark.usefixtures("standard_promotion")
def test_classes_are_trained_from_scratch(parts, tmp_path):
    """As a flow, then on cached latents; a learned variance is written but not trained.

    Captions are names of classes.
    """
    captions = sorted({text.strip() for text in _captions(parts / "images")})
    model = dataclasses.replace(DIT, num_embeds_ada_norm=len(captions))
    fields = {"model": model, "vae": str(parts / "vae"), "class_names": tuple(captions)}
    flow = {"schedule": FlowSchedule(), "prediction_type": "flow_prediction"}
    result = jaxdiff.train(training(parts, **fields, **flow), tmp_path / "run")
    pipe = jaxdiff.load(result.export)
    assert (pipe.family.name, pipe.prediction_type) == ("DiT", "flow_prediction")
    assert pipe(captions[-1], steps=2, output="numpy").images.shape == (1, 16, 16, 3)
    columns = np.asarray(pipe.transformer.proj_out_2.kernel[...]).reshape(16, 2, 2, 8)
    assert np.abs(columns[..., :4]).max() > 0
    np.testing.assert_array_equal(columns[..., 4:], 0)
    before = param_dict(pipe.transformer)
    command = [str(parts / "vae"), str(tmp_path / "latents"), "--kind", "folder", "--resolution"]
    command += ["16", "--bucket-multiple", "8", "--path", str(parts / "images")]
    assert main.run("cache-latents", command) == 0
    latents = DataConfig(kind="latents", path=str(tmp_path / "latents"), validation_size=2)
    config = training(parts, latents, pipeline=str(result.export))
    again = jaxdiff.train(config, tmp_path / "tuned")
    after = param_dict(jaxdiff.load(again.export).transformer)
    assert np.abs(before["proj_out_2.kernel"] - after["proj_out_2.kernel"]).max() > 0
    with pytest.raises(InputError, match=r"objective\.text_encoder: got text, expected it left"):
        DiffusionObjective(model=model, vae="vae", text_encoder="text")
    with pytest.raises(InputError, match=r"objective\.class_names: got some, expected them left"):
        DiffusionObjective(model=PIXART, vae="vae", text_encoder="text", class_names=("a",))
    with pytest.raises(InputError, match=r"objective\.model\.in_channels: got 3, expected 4"):
        jaxdiff.train(
            training(parts, **fields | {"model": dataclasses.replace(model, in_channels=3)}),
            tmp_path / "other",
        )


def _captions(folder):
    """The captions of a folder of images."""
    return [file.read_text() for file in folder.rglob("*.txt")]


def test_conditioning_of_a_batch(dit):
    """Dropped captions are no class."""
    (extra,) = dit.family.extras
    batch = {name: jnp.asarray(x) for name, x in extra.columns(["disc", "3", ""]).items()}
    np.testing.assert_array_equal(batch["class_labels"], [0, 3, 5])
    labels = jax.jit(extra.of_batch)(batch, jnp.array([False, True, False]))
    np.testing.assert_array_equal(labels, [0, 5, 5])


CONFIGS = {
    "unet": (UNet2DConditionConfig(norm_num_groups=4), "--objective.model.norm-num-groups", "8"),
    "classes": (
        ClassConditionalUNet2DConfig(cross_attention_dim=512, num_classes=7),
        "--objective.model.num-classes",
        "9",
    ),
    "dit": (DIT, "--objective.model.num-layers", "3"),
    "pixart": (PIXART, "--objective.model.caption-channels", "12"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_options_and_stored_configs_keep_the_class_of_the_network(name, tmp_path):
    """Of the command line, and of the config.json of a workdir."""
    model, option, value = CONFIGS[name]
    text = {} if name in ("classes", "dit") else {"text_encoder": "t"}
    config = TrainConfig(
        objective=DiffusionObjective(model=model, vae="v", **text),
        data=DataConfig(kind="folder", path="images", resolution=64),
        steps=1,
        batch_size=8,
    )
    write_config(config, resume_identity(config), tmp_path)
    assert read_config(tmp_path) == config
    (tmp_path / "config.py").write_text(
        f"from jaxdiff.experiments.workdir import read_config\n"
        f"import pathlib\nconfig = read_config(pathlib.Path({str(tmp_path)!r}))\n"
    )
    field = option.rpartition(".")[2].replace("-", "_")
    arguments = [str(tmp_path / "config.py"), "--workdir", str(tmp_path / "run")]
    assert parse(arguments).config == config
    changed = parse([*arguments, option, value]).config.objective.model
    assert changed == dataclasses.replace(model, **{field: int(value)})
