"""GLIDE: its files and their vocabulary, its stages one after the other, and what is refused."""

import dataclasses
import gzip
import json
import math
import pathlib
import re

import glide_files
import jax.numpy as jnp
import numpy as np
import pytest
from captioned_images import write_folder
from original_keys import entries
from PIL import Image
from tiny import first_devices

import jaxdiff
from jaxdiff.checkpoints.components import Component, write_component
from jaxdiff.checkpoints.description import describe
from jaxdiff.checkpoints.key_mapping import path_to_torch_key, torch_shape
from jaxdiff.checkpoints.layout_registry import layout_for, layout_of
from jaxdiff.checkpoints.models import read_model
from jaxdiff.checkpoints.pipelines import write_pipeline
from jaxdiff.checkpoints.safetensors import LazyTensor, read_table, read_tensor
from jaxdiff.checkpoints.single_file import write_single_file
from jaxdiff.cli import main
from jaxdiff.core.errors import InputError
from jaxdiff.families.detection import detect_family
from jaxdiff.families.glide import UPSAMPLER
from jaxdiff.models.build import abstract, param_dict, with_params
from jaxdiff.models.clip import CLIPModel
from jaxdiff.models.clip_config import CLIPTextConfig, CLIPVisionConfig, NoisyCLIPVisionConfig
from jaxdiff.models.glide_text.config import GlideTextConfig
from jaxdiff.models.glide_text.module import GlideTextModel
from jaxdiff.models.presets import preset
from jaxdiff.models.unet.config import UNet2DConditionConfig
from jaxdiff.models.unet.module import UNet2DConditionModel
from jaxdiff.parallel.sharding import ANY, CLIP, UNET, spec
from jaxdiff.pipeline.cascade import Cascade
from jaxdiff.pipeline.prompts import PromptTokenizer, chunk_prompt
from jaxdiff.pipeline.tokenizers import tokenizer_of
from jaxdiff.training.config import DataConfig, DiffusionObjective, OptimiserConfig, TrainConfig

TABLE = pathlib.Path(__file__).parents[1] / "checkpoints/original/glide.json.gz"
PUBLISHED = json.loads(gzip.decompress(TABLE.read_bytes()))
# The preset of the UNet, its channels, and the family.
VARIANTS = {
    "base": ("glide-base", 3, "GLIDE"),
    "base_inpaint": ("glide-base", 7, "GLIDE"),
    "upsample": ("glide-upsample", 6, "GLIDE upsampler"),
    "upsample_inpaint": ("glide-upsample", 10, "GLIDE upsampler"),
}
CLASSES = {
    "unet": (UNet2DConditionModel, UNet2DConditionConfig),
    "text_encoder": (GlideTextModel, GlideTextConfig),
}


def torch_shapes(module):
    return {path_to_torch_key(p): torch_shape(w.shape, p) for p, w in param_dict(module).items()}


@pytest.mark.parametrize("name", VARIANTS)
def test_published_files(name):
    """All tensors become those of networks whose config the shapes say, and back."""
    file = entries(PUBLISHED[name])
    layout = layout_of(file)
    below, modules, back = layout.below_prefixes(file), {}, {}
    for part in sorted(layout.components, key=lambda part: not part.prefix):
        own = {n: e for n, e in below.items() if n.startswith(part.prefix)}
        below = {n: e for n, e in below.items() if n not in own}
        tensors = part.read({n.removeprefix(part.prefix): e for n, e in own.items()})
        cls, config_class = CLASSES[part.name]
        modules[part.name] = abstract(cls, config_class(**layout.config(part, tensors)))
        shapes = {key: each.shape for key, each in tensors.items()}
        assert shapes == torch_shapes(modules[part.name])
        lazy = {n: LazyTensor(dtype=np.dtype("f4"), shape=s, fetch=list) for n, s in shapes.items()}
        back |= {key: list(each.shape) for key, each in part.write(lazy).items()}
    assert not below
    assert back == PUBLISHED[name]
    unet, channels, family = VARIANTS[name]
    wanted = dataclasses.replace(preset("unet", unet).config, in_channels=channels)
    assert modules["unet"].config == wanted
    assert modules["text_encoder"].config == preset("text", "glide").config
    found = detect_family(layout.pipeline, modules, source=name)
    assert (found.name, found.text_encoders[0].length) == (family, 128)
    assert found.latent_multiple == {64: 8, 256: 32}[wanted.sample_size]
    configs = {key: module.config for key, module in modules.items()}
    assert layout_for(layout.pipeline, configs, layout.scheduler).scheduler == layout.scheduler


@pytest.mark.parametrize(
    ("kind", "name", "rules"), [("unet", "glide-base", UNET), ("text", "glide", CLIP)]
)
def test_weights_are_split_as_those_of_their_kind(kind, name, rules):
    sizes = {"data": 1, "fsdp": 4, "tensor": 2}
    table = param_dict(preset(kind, name).abstract())
    for path, leaf in table.items():
        assert spec(path, leaf.shape, ANY, sizes) == spec(path, leaf.shape, rules, sizes), path
    both = [
        p
        for p, leaf in table.items()
        if set(spec(p, leaf.shape, ANY, sizes)) >= set(sizes) - {"data"}
    ]
    assert sum(math.prod(table[path].shape) for path in both) > 0.6 * sum(
        leaf.size for leaf in table.values()
    )


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Files of a base and an upsampler, with a vocabulary beside them."""
    folder = tmp_path_factory.mktemp("glide")
    for name, channels in (("base", 3), ("upsample", 6)):
        parts = glide_files.parts(folder / "vocabulary", channels)
        write_single_file(folder / f"{name}.safetensors", parts)
    glide_files.write_vocabulary(folder)
    return folder


def test_stages_follow_one_another(files):
    base, upsampler = (
        first_devices(jaxdiff.load(files / f"{name}.safetensors", dtype="float32"), 1)
        for name in ("base", "upsample")
    )
    own = {"steps": 2, "height": 16, "width": 16}
    shared = {"height": 8, "width": 8, "seed": [3, 5]}
    out = Cascade(base, upsampler)(
        "a red cat", steps=2, **shared, stage_options=[own], output="latent"
    )
    images = base("a red cat", steps=2, **shared, output="latent").images
    assert images.shape == (2, 8, 8, 3)
    want = upsampler("a red cat", **own, seed=[3, 5], image=images, output="latent")
    np.testing.assert_array_equal(out.images, want.images)
    assert (want.request.guidance_scale, upsampler.defaults.steps) == (1.0, 27)
    assert (base.defaults.guidance_scale, base.defaults.steps, base.defaults.height) == (3, 100, 64)
    other = upsampler("cat", **own, seed=[3, 5], image=images, output="latent").images
    assert np.abs(other - want.images).max() > 1e-3


def test_an_empty_text_is_padding(files):
    """Not a space, which is a token of this vocabulary."""
    folder = read_model(files / "base.safetensors", only=()).tokenizers["tokenizer"]
    tokenizer = PromptTokenizer(tokenizer_of(folder, 12, lowercases=True))
    options = {"max_chunks": 1, "length": 12}
    end = len(glide_files.vocabulary()) - 1
    for syntax in (True, False):
        assert (chunk_prompt(tokenizer, "", syntax=syntax, **options).ids == end).all()
    ids = chunk_prompt(tokenizer, " A Red(cat:2)", **options).ids[0]
    tokens = {token: i for i, token in glide_files.vocabulary().items()}
    shown = [tokens[i] for i in ids.tolist()]
    assert shown == ["Ġa", "Ġred", "cat", *["<|endoftext|>"] * 9]


def test_timesteps_of_the_published_upsampler(files):
    """Few at the end of the process, as in the authors' notebook ("fast27")."""
    sections = zip(range(0, 1000, 200), (10, 10, 3, 2, 2), strict=True)
    times = {
        start + round(i * 199 / (count - 1)) for start, count in sections for i in range(count)
    }
    times = sorted(times - {999} | {997}, reverse=True)
    pipe = first_devices(jaxdiff.load(files / "upsample.safetensors", dtype="float32"), 1)
    out = pipe.resolve(
        "", timestep_spacing=",".join(map(str, times)), image=np.zeros((8, 8, 3), np.uint8)
    )
    assert (out[0].steps, len(times)) == (27, 27)


def test_a_file_on_a_mesh(files):
    """The rows of a head are put together before they are shared."""
    whole = read_model(files / "base.safetensors").components
    pipe = jaxdiff.load(files / "base.safetensors", dtype="float32", mesh="fsdp=2,tensor=2")
    for name, part in whole.items():
        for path, leaf in param_dict(part.module).items():
            got = param_dict(pipe.parts.components[name].module)[path]
            np.testing.assert_array_equal(np.asarray(got), np.asarray(leaf), err_msg=path)


def test_commands(files, tmp_path, capsys):
    """A file says what it is; a folder of it becomes the same file again."""
    assert main.run("inspect", [str(files / "base.safetensors")]) == 0
    shown = capsys.readouterr().out
    assert "GLIDE (single file), predicts epsilon" in shown
    assert "GlideTextModel" in shown
    assert "loading needs" not in shown
    for start, end in (("base.safetensors", "folder"), ("folder", "again.safetensors")):
        source = files / start if start.startswith("base") else tmp_path / start
        assert main.run("convert", [str(source), str(tmp_path / end)]) == 0
    index = json.loads((tmp_path / "folder/model_index.json").read_text())
    assert index["text_encoder"] == ["transformers", "GlideTextModel"]
    assert index["tokenizer"] == ["transformers", "GPT2Tokenizer"]
    before, after = (
        read_table(p) for p in (files / "base.safetensors", tmp_path / "again.safetensors")
    )
    assert before.keys() == after.keys()
    for name, entry in before.items():
        np.testing.assert_array_equal(read_tensor(entry), read_tensor(after[name]))


@pytest.mark.parametrize("compress", [bytes, gzip.compress])
def test_the_vocabulary_of_the_original_repository(files, tmp_path, compress):
    names = ["encoder.json", "vocab.bpe"]
    names = [f"{name}.gz" for name in names] if compress is gzip.compress else names
    glide_files.write_vocabulary(tmp_path, names, compress)
    (tmp_path / "x.safetensors").symlink_to(files / "base.safetensors")
    found = read_model(tmp_path / "x.safetensors", only=()).tokenizers["tokenizer"]
    assert found == read_model(files / "base.safetensors", only=()).tokenizers["tokenizer"]
    assert json.loads(found.files["vocab.json"]) == glide_files.vocabulary()


def test_missing_files_are_named(files, tmp_path):
    path = tmp_path / "base.safetensors"
    path.symlink_to(files / "base.safetensors")
    with pytest.raises(InputError, match=re.escape(f"or vocab.json and merges.txt in {tmp_path}")):
        read_model(path)
    assert describe(path).missing == ("tokenizer",)
    (tmp_path / "vocab.bpe").write_bytes((files / "merges.txt").read_bytes())
    with pytest.raises(InputError, match=re.escape(f"or encoder.json in {tmp_path}")):
        read_model(path)
    (tmp_path / "encoder.json").write_text('{"a</w>": 0, "<|endoftext|>": 1}')
    with pytest.raises(InputError, match=r"encoder\.json: got the vocabulary of another model"):
        read_model(path)
    (tmp_path / "encoder.json").unlink()
    for name in ("encoder.json.gz", "vocab.bpe.gz"):
        (tmp_path / name).write_bytes(b"no gzip")
    with pytest.raises(InputError, match=r"encoder\.json\.gz: got Not a gzipped file"):
        read_model(path)


def test_a_clip_of_noisy_images_needs_pixels_and_both_files(files, tmp_path):
    config = NoisyCLIPVisionConfig(
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=1,
        image_size=8,
        patch_size=4,
        num_timesteps=900,
    )
    module = abstract(CLIPModel, CLIPTextConfig(), config, 6)
    with pytest.raises(InputError, match="timesteps: got none, expected some for a CLIP of noisy"):
        module.image_embeds(jnp.zeros((1, 8, 8, 3)))
    shared = {f.name: getattr(config, f.name) for f in dataclasses.fields(CLIPVisionConfig)}
    plain = abstract(CLIPModel, CLIPTextConfig(), CLIPVisionConfig(**shared))
    with pytest.raises(InputError, match="timesteps: got some, expected none"):
        plain.image_embeds(jnp.zeros((1, 8, 8, 3)), jnp.zeros(1, jnp.int32))
    text = dataclasses.replace(CLIPTextConfig(), vocab_size=4, num_hidden_layers=1)
    module = abstract(CLIPModel, text, config, 6)
    zeros = {path: jnp.zeros(leaf.shape) for path, leaf in param_dict(module).items()}
    write_component(tmp_path / "clip", Component(module=with_params(module, zeros)))
    pipe = first_devices(jaxdiff.load(files / "base.safetensors", dtype="float32"), 1)
    with pytest.raises(InputError, match="clip: got a CLIP of noisy images with 900 timesteps"):
        pipe.load_clip(tmp_path / "clip")
    (tmp_path / "clip_image_enc.pt").touch()
    with pytest.raises(InputError, match=r"clip: got no clip_text_enc\.pt in"):
        pipe.load_clip(tmp_path)


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("unet", {"in_channels": 5}, "got 5 channels in and 6 out, expected 3, 7, 6, 10 in"),
        ("unet", {"class_embed_type": None}, "got class_embed_type None and a time embedding"),
        ("unet", {"cross_attention_dim": 32}, "got hidden states of width 64, expected 32"),
        ("text_encoder", {"projection_dim": 8}, "width 128, expected identity and 8"),
    ],
)
def test_networks_that_do_not_fit(name, fields, message):
    configs = {"unet": glide_files.UNET, "text_encoder": glide_files.TEXT}
    configs[name] = dataclasses.replace(configs[name], **fields)
    modules = {key: abstract(CLASSES[key][0], config) for key, config in configs.items()}
    with pytest.raises(InputError, match=message):
        detect_family("GlidePipeline", modules, source="here")


def test_refusals(files, tmp_path):
    configs = {"unet": glide_files.UNET, "text_encoder": glide_files.TEXT}
    narrow = configs | {"unet": dataclasses.replace(glide_files.UNET, attention_head_dim=32)}
    with pytest.raises(InputError, match="unet: got attention heads of width 32, expected 64"):
        layout_for("GlidePipeline", narrow, {})
    encoder = abstract(GlideTextModel, glide_files.TEXT)
    with pytest.raises(InputError, match="ids: got 3 tokens, expected 12"):
        encoder.features(jnp.zeros((1, 3), jnp.int32))
    with pytest.raises(InputError, match="pad_token_id: got 264, expected a number from 0 to 263"):
        dataclasses.replace(glide_files.TEXT, pad_token_id=len(glide_files.vocabulary()))
    pipe = first_devices(jaxdiff.load(files / "upsample.safetensors", dtype="float32"), 1)
    with pytest.raises(InputError, match="image: got none, expected the image to enlarge"):
        pipe("a cat", height=16, width=16)
    write_pipeline(tmp_path / "inpaint", glide_files.parts(tmp_path / "words", 7))
    pipe = first_devices(jaxdiff.load(tmp_path / "inpaint", dtype="float32"), 1)
    with pytest.raises(InputError, match="mask"):
        pipe("a cat", mask=np.ones((8, 8), bool))


def test_a_stage_is_trained_on_what_it_is_given():
    """The image to enlarge, as of a request; of a training it has no noise."""
    images = np.random.default_rng(0).uniform(-1, 1, (2, 4, 4, 3)).astype(np.float32)
    batch = {"low_resolution": jnp.asarray(images), "low_resolution_noise": jnp.zeros((2, 8, 8, 3))}
    got = UPSAMPLER.batch_conditioning(batch, jnp.zeros(2, bool))["channels"]
    eight = Image.fromarray(np.round((images[0] + 1) * 127.5).astype(np.uint8))
    corner = np.asarray(eight, np.float32)[0, 0] / 127.5 - 1
    np.testing.assert_allclose(got[0, 0, 0], corner, atol=1e-6)
    # a quarter of the way from the first pixel to the second
    row = np.asarray(eight, np.float32)[0] / 127.5 - 1
    np.testing.assert_allclose(got[0, 0, 1], 0.75 * row[0] + 0.25 * row[1], atol=1e-6)


@pytest.mark.slow
@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize(("channels", "side", "options"), [(3, 8, {}), (6, 16, {"enlargement": 2})])
def test_both_stages_are_fine_tuned(tmp_path, channels, side, options):
    write_pipeline(tmp_path / "model", glide_files.parts(tmp_path / "words", channels))
    write_folder(tmp_path / "images", 12, sizes=((16, 16),))
    data = DataConfig(
        kind="folder",
        path=str(tmp_path / "images"),
        resolution=side,
        bucket_multiple=8,
        validation_size=4,
        cache_dir=str(tmp_path / "cache"),
    )
    config = TrainConfig(
        objective=DiffusionObjective(pipeline=str(tmp_path / "model"), sample_steps=2, **options),
        data=data,
        optimiser=OptimiserConfig(warmup_steps=0),
        steps=2,
        batch_size=8,
        log_every=1,
        sample_every=2,
        tensorboard=False,
    )
    result = jaxdiff.train(config, tmp_path / "run", progress=False)
    assert np.isfinite(result.metrics["loss"])
    pipe = first_devices(jaxdiff.load(result.export, dtype="float32"), 1)
    assert pipe.family.name == ("GLIDE" if channels == 3 else "GLIDE upsampler")
    before, after = (
        param_dict(read_model(path).components["unet"].module)
        for path in (tmp_path / "model", result.export)
    )
    assert not np.array_equal(before["conv_out.kernel"], after["conv_out.kernel"])
