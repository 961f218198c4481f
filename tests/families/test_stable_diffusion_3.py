"""Stable Diffusion 3: how its text encoders are joined, which may be missing, and its folders."""

import dataclasses
import json

import jax.numpy as jnp
import lora_training
import numpy as np
import pytest
import tiny
from originals import write_safetensors

import jaxdiff
from jaxdiff.checkpoints.pipelines import read_pipeline, write_pipeline
from jaxdiff.cli import main
from jaxdiff.core.errors import InputError
from jaxdiff.diffusion.schedules import FlowSchedule
from jaxdiff.families.base import TextEncoderOutput
from jaxdiff.families.detection import family_of
from jaxdiff.families.stable_diffusion_3 import JoinCLIPAndT5
from jaxdiff.guidance.base import parse
from jaxdiff.models.build import param_dict
from jaxdiff.models.clip import CLIPTextModel
from jaxdiff.models.sd3.config import SD3Transformer2DConfig
from jaxdiff.models.sd3.module import SD3Transformer2DModel
from jaxdiff.models.t5.config import T5Config
from jaxdiff.models.t5.module import T5EncoderModel
from jaxdiff.models.vae import AutoencoderKL
from jaxdiff.pipeline.cascade import hires_fix
from jaxdiff.pipeline.defaults import model_defaults

WIDTH, LENGTH, CHANNELS = 24, 12, 6
PROMPT = "a small red circle"
TRANSFORMER = SD3Transformer2DConfig(
    sample_size=8,
    in_channels=CHANNELS,
    out_channels=CHANNELS,
    num_layers=2,
    attention_head_dim=4,
    num_attention_heads=2,
    joint_attention_dim=WIDTH,
    caption_projection_dim=8,
    pooled_projection_dim=20,
    pos_embed_max_size=6,
)
ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")


def write_sd3(folder, *, encoders=ENCODERS, transformer=TRANSFORMER, **components):
    """A pipeline folder with these text encoders; any tokenizer does for T5."""
    plain = read_pipeline(tiny.write_tiny(folder / "sd"))
    files = plain.tokenizers["tokenizer"]
    clip = dataclasses.replace(plain.components["text_encoder"].module.config, eos_token_id=2)
    second = dataclasses.replace(clip, hidden_size=12, projection_dim=12)
    vae = dataclasses.replace(
        plain.components["vae"].module.config, latent_channels=CHANNELS, shift_factor=0.1
    )
    t5 = T5Config(vocab_size=clip.vocab_size, d_model=WIDTH, d_ff=16, num_layers=1, num_heads=2)
    made = {
        "transformer": tiny.random_component(SD3Transformer2DModel, transformer, seed=1),
        "vae": tiny.random_component(AutoencoderKL, vae, seed=2),
        ENCODERS[0]: tiny.random_component(CLIPTextModel, clip, with_projection=True, seed=3),
        ENCODERS[1]: tiny.random_component(CLIPTextModel, second, with_projection=True, seed=4),
        ENCODERS[2]: tiny.random_component(T5EncoderModel, t5, seed=5),
    } | components
    absent = [name for name in ENCODERS if name not in encoders]
    names = [name.replace("text_encoder", "tokenizer") for name in encoders]
    parts = dataclasses.replace(
        plain,
        class_name="StableDiffusion3Pipeline",
        components={name: part for name, part in made.items() if name not in absent},
        tokenizers=dict.fromkeys(names, files),
        scheduler={"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0},
        absent=tuple(absent),
        defaults={},
    )
    write_pipeline(folder / "model", parts)
    return folder / "model"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_sd3(tmp_path_factory.mktemp("sd3"))


@pytest.fixture(scope="module")
def pipe(folder):
    return tiny.first_devices(jaxdiff.load(folder, dtype="float32"), 1)


def rows(*shape, start=1):
    return jnp.arange(start, start + np.prod(shape), dtype=jnp.float32).reshape(shape)


def outputs(*names):
    """What the encoders give for one text: widths 2 and 3, pooled 2 and 3, T5 of width 7."""
    every = {
        "text_encoder": TextEncoderOutput(rows(1, 2, 2), rows(1, 2)),
        "text_encoder_2": TextEncoderOutput(rows(1, 2, 3, start=50), rows(1, 3, start=50)),
        "text_encoder_3": TextEncoderOutput(rows(1, 4, 7, start=90)),
    }
    return {name: output for name, output in every.items() if name in names}


JOIN = JoinCLIPAndT5(width=7, pooled_width=5, clip_tokens=2, t5_tokens=4)


def test_encoders_are_joined():
    joined = JOIN(outputs(*ENCODERS))
    assert joined.hidden_states.shape == (1, 6, 7)
    assert joined.hidden_states[0, 0].tolist() == [1, 2, 50, 51, 52, 0, 0]
    assert joined.hidden_states[0, 1].tolist() == [3, 4, 53, 54, 55, 0, 0]
    np.testing.assert_array_equal(joined.hidden_states[:, 2:], rows(1, 4, 7, start=90))
    assert joined.pooled.tolist() == [[1, 2, 50, 51, 52]]
    assert joined.mask is None


@pytest.mark.parametrize("missing", ENCODERS)
def test_an_encoder_that_is_missing_gives_zeros(missing):
    names = [name for name in ENCODERS if name != missing]
    joined, whole = JOIN(outputs(*names)), JOIN(outputs(*ENCODERS))
    own = {"text_encoder": np.s_[:, :2, :2], "text_encoder_2": np.s_[:, :2, 2:5]}
    states = whole.hidden_states.at[own.get(missing, np.s_[:, 2:])].set(0)
    np.testing.assert_array_equal(joined.hidden_states, states)
    pooled = {"text_encoder": np.s_[:, :2], "text_encoder_2": np.s_[:, 2:]}
    want = whole.pooled.at[pooled[missing]].set(0) if missing in pooled else whole.pooled
    np.testing.assert_array_equal(joined.pooled, want)


def test_t5_alone():
    joined = JOIN(outputs("text_encoder_3"))
    assert not np.any(joined.hidden_states[:, :2])
    np.testing.assert_array_equal(joined.hidden_states[:, 2:], rows(1, 4, 7, start=90))
    assert joined.pooled.tolist() == [[0] * 5]


def test_it_generates(pipe):
    """One step of the flow from pure noise, by hand: x0 = noise - v."""
    assert isinstance(pipe.schedule, FlowSchedule)
    assert (pipe.defaults.guidance_scale, pipe.defaults.steps) == (7.0, 28)
    noise = np.random.default_rng(0).normal(size=(1, 8, 8, CHANNELS)).astype(np.float32)
    prompts = {"prompt_2": "a blue star", "prompt_3": "a green square"}
    options = {"latents": noise, "steps": 1, "output": "latent", "guidance_scale": 1.0}
    out = pipe(PROMPT, **prompts, **options)
    ids = [
        jnp.asarray([pipe.tokenizer(text, padding="max_length", max_length=length)["input_ids"]])
        for text, length in zip((PROMPT, *prompts.values()), (LENGTH, LENGTH, 256), strict=True)
    ]
    clip, second = (
        encoder.features(each) for encoder, each in zip(pipe.text_encoders[:2], ids, strict=False)
    )
    states = jnp.concatenate([clip.penultimate, second.penultimate], axis=-1)
    states = jnp.pad(states, ((0, 0), (0, 0), (0, WIDTH - 20)))
    context = jnp.concatenate([states, pipe.text_encoders[2].features(ids[2]).last], axis=1)
    pooled = jnp.concatenate([clip.pooled, second.pooled], axis=-1)
    v = pipe.transformer(
        jnp.asarray(noise), jnp.array([1000.0]), context, pooled_projections=pooled
    )
    np.testing.assert_allclose(out.images, noise - np.asarray(v), atol=1e-4)
    assert out.request[0].to_metadata()["prompt_3"] == "a green square"


def test_a_negative_prompt_that_is_not_given_is_the_empty_text(pipe):
    options = {"steps": 2, "output": "latent", "guidance_scale": 3.0}
    plain, empty = pipe(PROMPT, **options), pipe(PROMPT, negative_prompt="", **options)
    np.testing.assert_array_equal(plain.images, empty.images)
    other = pipe(PROMPT, negative_prompt="a blue star", **options)
    assert np.abs(other.images - plain.images).max() > 1e-3


def test_texts_are_cut_at_their_length(pipe):
    """CLIP's at one chunk, with a warning; T5 reads on."""
    long, options = " ".join(["red"] * 20), {"steps": 1, "output": "latent", "guidance_scale": 1.0}
    with pytest.warns(UserWarning, match="truncated"):
        cut = pipe("a", prompt_2=long, **options)
    with pytest.warns(UserWarning, match="truncated"):
        same = pipe("a", prompt_2=f"{long} star", **options)
    np.testing.assert_array_equal(cut.images, same.images)
    first = pipe("a", prompt_3=long, **options)
    assert np.any(first.images != pipe("a", prompt_3=f"{long} star", **options).images)


@pytest.mark.parametrize(
    "encoders", [ENCODERS[:2], ENCODERS[2:], ENCODERS[1:], (ENCODERS[0], ENCODERS[2])]
)
def test_models_without_some_encoders(pipe, tmp_path, encoders):
    """The prompts that are left are read by the same encoders."""
    less = jaxdiff.load(write_sd3(tmp_path, encoders=encoders), dtype="float32")
    options = {"steps": 1, "output": "latent", "seed": 3, "guidance_scale": 1.0}
    texts = {"prompt": "a", "prompt_2": "red", "prompt_3": "star"}
    read = {name.replace("text_encoder", "prompt") for name in encoders}
    plain = less("a", **options).images
    for name in texts.keys() - {"prompt"}:
        if name in read:
            assert np.any(less("a", **{name: texts[name]}, **options).images != plain)
        else:
            with pytest.raises(InputError, match=f"{name}: got .*, expected none"):
                less("a", **{name: texts[name]}, **options)
    assert np.any(pipe("a", **options).images != plain)


def test_the_name_tells_turbo(tmp_path):
    """Its files are those of Large; what jaxdiff.json says comes first."""
    normed = dataclasses.replace(TRANSFORMER, qk_norm="rms_norm")
    parts = read_pipeline(write_sd3(tmp_path, transformer=normed), only=())
    family, plain = family_of(parts, "x"), read_pipeline(tmp_path / "model", only=())
    for name, stored, wanted in (
        ("stabilityai/stable-diffusion-3.5-large-turbo", {}, (1.0, 4)),
        ("models/sd3.5_large_Turbo.safetensors", {"steps": 6}, (1.0, 6)),
        ("turbo/stable-diffusion-3.5-large", {}, (4.5, 28)),
    ):
        found = model_defaults(dataclasses.replace(plain, defaults=stored), family, name)
        assert (found.guidance_scale, found.steps) == wanted


def test_texts_have_the_length_that_is_asked_for(pipe):
    """Of T5 alone, and the rest of a text is cut."""
    requests = pipe.resolve(PROMPT, max_sequence_length=3)
    with pytest.warns(UserWarning, match="truncated, 3 tokens .* in text_encoder_3"):
        pipe._tokenizers.num_chunks(requests, parse("none").streams)
    tokens = pipe._tokenizers.tokenize(requests, parse("none").streams)
    assert [ids.shape[-1] for ids in tokens.ids][2] == 3
    assert pipe._tokenizers.tokenize(pipe.resolve(PROMPT), parse("none").streams).ids[2].shape == (
        1,
        1,
        1,
        256,
    )


def test_sizes_are_multiples_of_patches(pipe):
    with pytest.raises(InputError, match="height: got 18, expected a multiple of 4 such as 16"):
        pipe(PROMPT, height=18, steps=1)
    with pytest.raises(InputError, match="height: got 28, expected at most 24, for which"):
        pipe(PROMPT, height=28, steps=1)
    image = np.zeros((18, 22, 3), np.uint8)
    with pytest.warns(UserWarning, match="resized from height 18 to 16, width 22 to 24"):
        out = pipe(PROMPT, image=image, steps=2, strength=0.5)
    assert out.images[0].size == (24, 16)
    larger = hires_fix(pipe, PROMPT, height=8, width=16, scale=1.3, steps=2)
    assert larger.images[0].size == (20, 12)


def test_a_strength_runs_the_next_whole_number_of_steps(pipe):
    """As diffusers' pipelines of flows do: 4 of 10 steps for 0.33, and not 3."""
    image = np.full((16, 16, 3), 128, np.uint8)
    calls = []
    pipe(PROMPT, image=image, steps=10, strength=0.33, callback=lambda done, of: calls.append(of))
    assert set(calls) == {4}


def test_inspect_and_convert(folder, tmp_path, capsys):
    assert main.run("inspect", [str(folder), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["family"] == "StableDiffusion3Pipeline"
    assert found["prediction_type"] == "flow_prediction"
    parts = {part["name"]: part for part in found["parts"]}
    assert parts["transformer"]["class_name"] == "SD3Transformer2DModel"
    assert parts.keys() == {"transformer", "vae", *ENCODERS}
    assert main.run("convert", [str(folder), str(tmp_path / "half"), "--dtype", "bfloat16"]) == 0
    half = read_pipeline(tmp_path / "half")
    whole = read_pipeline(folder)
    assert half.components.keys() == whole.components.keys()
    assert half.tokenizers.keys() == whole.tokenizers.keys()
    table = half.components["transformer"].module.pos_embed.pos_embed
    assert table.dtype == jnp.bfloat16
    full = whole.components["transformer"].module.pos_embed.pos_embed[...]
    np.testing.assert_array_equal(table[...], full.astype(jnp.bfloat16))


def test_bfloat16_is_close(folder, pipe):
    options = {"steps": 2, "output": "latent", "seed": 1, "guidance_scale": 2.0}
    half = tiny.first_devices(jaxdiff.load(folder, dtype="bfloat16"), 1)(PROMPT, **options).images
    want = pipe(PROMPT, **options).images
    assert np.abs(half - want).max() < 0.1 * np.abs(want).max()


@pytest.mark.parametrize("mesh", ["fsdp=2", "fsdp=2,tensor=2"])
def test_on_a_mesh_the_images_are_the_same(folder, pipe, mesh):
    options = {"steps": 2, "output": "latent", "seed": 1, "guidance_scale": 2.0}
    shared = jaxdiff.load(folder, dtype="float32", mesh=mesh)
    np.testing.assert_allclose(
        shared(PROMPT, **options).images, pipe(PROMPT, **options).images, atol=1e-4
    )


def test_what_does_not_fit_together(folder, tmp_path):
    parts = read_pipeline(folder)
    narrow = dataclasses.replace(TRANSFORMER, pooled_projection_dim=21)
    with pytest.raises(InputError, match="pooled embeddings of width 20 in CLIP, expected 21"):
        jaxdiff.load(write_sd3(tmp_path / "pooled", transformer=narrow))
    wide = dataclasses.replace(TRANSFORMER, joint_attention_dim=32)
    with pytest.raises(InputError, match="text_encoder_3: got hidden states of width 24"):
        jaxdiff.load(write_sd3(tmp_path / "t5", transformer=wide))
    with pytest.raises(InputError, match="text encoders: got none"):
        jaxdiff.load(write_sd3(tmp_path / "none", encoders=()))
    plain = tiny.random_component(
        CLIPTextModel, parts.components["text_encoder"].module.config, seed=3
    )
    with pytest.raises(InputError, match="CLIP without text_projection"):
        jaxdiff.load(write_sd3(tmp_path / "projection", text_encoder=plain))
    channels = dataclasses.replace(TRANSFORMER, in_channels=4, out_channels=4)
    with pytest.raises(InputError, match=r"transformer: got channels \(4, 4\), expected 6"):
        jaxdiff.load(write_sd3(tmp_path / "channels", transformer=channels))


@pytest.mark.slow
@pytest.mark.usefixtures("standard_promotion")
def test_a_lora_of_the_attention_is_trained(folder, tmp_path):
    """Of both streams, on cached latents and text states."""
    file = lora_training.train(folder, tmp_path)
    assert lora_training.modules(file) == lora_training.attention(2, last_context=False)
    lora_training.check_effect(folder, file)


def test_a_lora_of_another_family_changes_nothing(pipe, tmp_path):
    file = tmp_path / "flux.safetensors"
    name = "lora_unet_double_blocks_0_img_attn_proj"
    factors = {"down": np.ones((2, 8), np.float32), "up": np.ones((8, 2), np.float32)}
    write_safetensors(file, {f"{name}.lora_{role}.weight": a for role, a in factors.items()})
    before = param_dict(pipe.transformer)
    with pytest.raises(InputError, match=r"a LoRA for FLUX\.1, expected one for Stable"):
        pipe.load_lora(file)
    assert all(array is before[path] for path, array in param_dict(pipe.transformer).items())
