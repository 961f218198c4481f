"""cache-latents --texts embeddings: what encoders say, and a training that does not ask them."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from captioned_images import write_folder

from jaxdiff.checkpoints.components import read_component
from jaxdiff.cli import main
from jaxdiff.cli.train import run as train
from jaxdiff.core.errors import InputError
from jaxdiff.data.latent_records import pack_record, read_null
from jaxdiff.data.latents import NULL_CAPTION_FILE, LatentCacheInfo, LatentSource, read_description
from jaxdiff.experiments.base_model import load_base_model
from jaxdiff.experiments.diffusion import wire_diffusion
from jaxdiff.experiments.experiment import FILES, training_batches
from jaxdiff.experiments.latent_cache import check_latent_cache
from jaxdiff.experiments.loggers import read_lines
from jaxdiff.experiments.train import experiment
from jaxdiff.experiments.training_methods import make_training_method
from jaxdiff.models.clip import CLIPTextModel
from jaxdiff.models.vae import AutoencoderKL
from jaxdiff.training.config import (
    DataConfig,
    DiffusionObjective,
    Full,
    LoRA,
    TextualInversion,
    TrainConfig,
)
from jaxdiff.training.objectives.diffusion import Frozen, caption_dropout_masks, diffusion_task
from jaxdiff.training.objectives.trainable import frozen_networks_used
from jaxdiff.training.step import per_sample_split

COUNT = 20
THINGS = [
    f"{s} {c}" for s in ("small", "large") for c in ("red circle", "blue star", "green square")
]
CAPTIONS = [
    f"a {THINGS[i % 6]} above a {THINGS[i * i % 5]}"[: 12 + i].strip() for i in range(COUNT)
]
CONFIG = """
from jaxdiff.training.config import DataConfig, DiffusionObjective, TrainConfig
objective = DiffusionObjective(pipeline="FOLDER/sd", sample_steps=2)
config = TrainConfig(objective=objective, steps=2, batch_size=8, sample_every=2, log_every=1,
    data=DataConfig(kind="latents", path="FOLDER/sd-float16", validation_size=2))
"""
NAMES = {"sd": ("states",), "xl": ("states", "states_2", "pooled")}


def cache(folder, model, output, *more):
    """Cache all pictures, in shards of eight."""
    command = [
        *(str(folder / model), str(folder / output), "--texts", "embeddings", "--kind", "folder"),
        *("--path", str(folder / "in"), "--resolution", "16", "--bucket-multiple", "16"),
        *("--shard-size", "8", "--min-bucket-size", "8", *more),
    ]
    return main.run("cache-latents", command)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Models of both families, pictures, and what is cached of these."""
    folder = tmp_path_factory.mktemp("texts")
    tiny.write_tiny(folder / "sd")
    tiny.write_xl(folder / "xl")
    write_folder(folder / "in", COUNT, sizes=((16, 16),))
    for i, caption in enumerate(CAPTIONS):
        (folder / "in" / f"{i:04d}.txt").write_text(caption)
    for model, dtype in (("xl", "float32"), ("xl", "float16"), ("sd", "float16")):
        assert cache(folder, model, f"{model}-{dtype}", "--dtype", dtype) == 0
    return folder


def objective_of(made, model, **choices):
    """A training of a model's UNet."""
    return DiffusionObjective(pipeline=str(made / model), **choices)


def contents(folder):
    """All files of a folder."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_what_is_stored_is_what_the_encoders_say(made):
    folder = made / "xl-float32"
    source, described = LatentSource(str(folder)), read_description(folder)
    texts = load_base_model(objective_of(made, "xl")).caption_tokenizer()
    captions = [source[i]["caption"] for i in range(len(source))]
    assert sorted(captions) == sorted(CAPTIONS)
    ids = texts([*captions, ""])
    rows = [*(source[i] for i in range(len(source))), read_null(folder, described)]
    expected = {}
    for i, name in enumerate(("text_encoder", "text_encoder_2")):
        encoder = read_component(made / "xl" / name).module
        found = jax.jit(encoder.features)(ids[("ids", "ids_2")[i]])
        expected[("states", "states_2")[i]] = found.penultimate
        expected["pooled"] = found.pooled  # the last one's
    for name, arrays in expected.items():
        np.testing.assert_allclose(
            np.stack([row[name] for row in rows]), arrays, rtol=1e-4, atol=1e-5, err_msg=name
        )
    plain = read_component(made / "sd" / "text_encoder").module
    null = read_null(made / "sd-float16", read_description(made / "sd-float16"))
    assert list(null) == ["states"]
    last = jax.jit(plain.features)(ids["ids"][-1:]).last[0]
    np.testing.assert_allclose(null["states"].astype(np.float32), last, rtol=2.0**-10, atol=1e-4)


@pytest.mark.parametrize(
    ("cache_of", "silent", "each"),
    [
        ("xl-float32", False, (0.3, 0.4)),
        ("xl-float16", True, (0.3, 0.4)),
        ("sd-float16", False, ()),
    ],
)
def test_a_step_loses_what_it_would_from_captions(made, cache_of, silent, each):
    """The same batch, its captions read by the encoders, and as these have been cached."""
    model, _, dtype = cache_of.partition("-")
    objective = objective_of(made, model, caption_dropout=0.3, caption_dropout_per_encoder=each)
    data = DataConfig(kind="latents", path=str(made / cache_of), validation_size=1)
    base = load_base_model(objective)
    config = TrainConfig(objective=objective, data=data, batch_size=16, steps=1)
    chosen = make_training_method(base, jnp.float32, None)
    described = check_latent_cache(data, base, chosen.partition)
    stream = training_batches(config, chosen.caption_tokenizer)
    batch = next(stream)
    stream.close()
    assert {str(batch[name].dtype) for name in NAMES[model]} == {dtype}
    ids = {name: batch[name] for name in chosen.caption_tokenizer.tokenizers}
    rest = {name: batch[name] for name in ("mean", "logvar", "time_ids")}
    stored = {name: batch[name] for name in NAMES[model]}, read_null(made / cache_of, described)
    said, null = jax.tree.map(lambda array: array.astype(np.float32), stored)

    kept = frozen_networks_used(chosen.partition, latents=True, text_encodings=False)
    assert set(kept) == set(base.text_encoders)
    assert frozen_networks_used(chosen.partition, latents=True, text_encodings=True) == ()
    empty = zip(base.text_encoders, chosen.caption_tokenizer([""]).values(), strict=True)
    reading = Frozen({name: base.host_weights(name) for name in kept}, {n: i[0] for n, i in empty})
    family = dataclasses.replace(base.family, zero_uncond=silent)
    learn = diffusion_task(base.objective, chosen.partition._replace(family=family))
    # What is told changes much, so that none of it can be another unnoticed.
    begin_with = {n: a * (10 if "attn2.to_v" in n else 1) for n, a in learn.init(0)}
    arguments = begin_with, reading, {**rest, **ids}
    params, reading, captions, rest = jax.tree.map(jnp.asarray, (*arguments, rest))
    key = jax.random.key(4)
    wanted, _ = jax.jit(learn.loss)(params, reading, captions, key)

    @jax.jit
    def from_stored(params, said, null):
        def loss(said, null):
            return learn.loss(params, Frozen({}, null), {**rest, **said}, key)[0]

        return jax.value_and_grad(loss, (0, 1))(said, null)

    found, (slopes, null_slopes) = from_stored(params, said, null)
    # Rounded to 11 bits every number s is off by 2^-11 |s| at most, subnormal ones by 2^-25; what
    # that does to the loss is to first order at most the sum of |slope| times it.
    off = 0.0
    if dtype == "float16":
        pairs = [(slopes, said), (null_slopes, null)]
        for slope, value in ((s[name], v[name]) for s, v in pairs for name in v):
            off += float(np.sum(np.abs(slope) * (2.0**-11 * np.abs(value) + 2.0**-25)))
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1.05 * off)
    assert off < 0.02 * wanted

    # The bounds would not hide another caption, or a null caption that is not told.
    tolerance = 3 * (1e-5 * float(wanted) + off)
    turned = {name: np.roll(array, 1, axis=0) for name, array in said.items()}
    assert abs(float(from_stored(params, turned, null)[0] - wanted)) > tolerance
    other = {name: np.roll(array, 1, axis=-1) for name, array in null.items()}
    moved = abs(float(from_stored(params, said, other)[0] - found))
    assert moved == 0 if silent else moved > tolerance
    drop_key = per_sample_split(key, 16, 4)[1]
    for dropped in caption_dropout_masks(drop_key, 16, len(base.text_encoders), 0.3, each):
        assert 0 < int(dropped.sum()) < 16


def test_a_step_reads_no_other_network(made, tmp_path, monkeypatch):
    """It holds the weights of none, and asks none while it is traced."""
    data = DataConfig(kind="latents", path=str(made / "xl-float16"), validation_size=1)
    config = TrainConfig(objective=objective_of(made, "xl"), data=data, batch_size=8, steps=1)
    config = dataclasses.replace(config, sample_every=0)
    parts = experiment(config, tmp_path)
    batch = next(parts.batches)
    parts.batches.close()
    assert parts.wiring.frozen.weights == {}
    assert set(batch) == {"mean", "logvar", "time_ids", *NAMES["xl"]}
    for owner, name in (
        (AutoencoderKL, "encode"),
        (AutoencoderKL, "decode"),
        (CLIPTextModel, "features"),
        (CLIPTextModel, "__call__"),
    ):
        monkeypatch.setattr(owner, name, lambda *_, name=name: pytest.fail(f"{name} was called"))
    learn, key = parts.wiring.task, jax.eval_shape(lambda: jax.random.key(0))
    batch = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, batch))
    value, _ = jax.eval_shape(learn.loss, learn.shapes, parts.wiring.frozen, batch, key)
    assert value.shape == ()


def wired(made, path, **fields):
    data = DataConfig(kind="latents", path=str(path), **fields)
    config = TrainConfig(objective=objective_of(made, "xl"), data=data, batch_size=8, steps=1)
    return wire_diffusion(dataclasses.replace(config, sample_every=0), jnp.dtype("float16"), FILES)


def test_a_plan_without_data_has_the_embeddings_that_the_config_asks_for(made, tmp_path):
    planned = wired(made, tmp_path / "none", text_embeddings=True)
    cached = wired(made, made / "xl-float16")
    assert planned.frozen == cached.frozen
    assert planned.frozen.weights == {}
    wanted, got = ({k: each.batch(8)[k] for k in NAMES["xl"]} for each in (cached, planned))
    assert got == wanted
    captions = wired(made, tmp_path / "none")
    assert captions.frozen.weights.keys() == {"text_encoder", "text_encoder_2"}


@pytest.mark.slow
@pytest.mark.usefixtures("standard_promotion")
def test_a_training_learns_draws_and_measures(made, tmp_path):
    path = tmp_path / "unet.py"
    path.write_text(CONFIG.replace("FOLDER", str(made)))
    train([str(path), "--workdir", str(tmp_path / "w")])
    log = read_lines(tmp_path / "w" / "log.jsonl")
    assert [line["step"] for line in log] == [1, 2]
    assert all(np.isfinite(line["loss"]) for line in log)
    assert np.isfinite(log[-1]["validation_loss"])
    assert (tmp_path / "w" / "samples" / "step_000002.png").exists()


def test_parts_are_the_whole_and_what_is_missing_is_made_again(made, capsys):
    whole = contents(made / "sd-float16")
    assert len(whole) == 5  # latents.json, the null caption, three shards
    for index in (1, 0):
        part = ["--process-index", str(index), "--process-count", "2"]
        assert cache(made, "sd", "parts", *part) == 0
        assert (made / "parts" / NULL_CAPTION_FILE).exists() == (index == 0)
    assert contents(made / "parts") == whole
    for name in (NULL_CAPTION_FILE, "latents-00001-of-00003.array_record"):
        (made / "parts" / name).unlink()
    kept = {p.name: p.stat().st_mtime_ns for p in (made / "parts").iterdir()}
    assert cache(made, "sd", "parts") == 0
    assert contents(made / "parts") == whole
    assert {n: (made / "parts" / n).stat().st_mtime_ns for n in kept} == kept
    capsys.readouterr()
    assert cache(made, "xl", "parts") == 2
    assert "with latents of text_encoders" in capsys.readouterr().err
    (made / "parts" / NULL_CAPTION_FILE).write_bytes(b"")
    with pytest.raises(InputError, match=r"null\.array_record: got a broken file"):
        read_null(made / "parts", read_description(made / "parts"))
    (made / "parts" / NULL_CAPTION_FILE).unlink()
    with pytest.raises(InputError, match=r"without null\.array_record, expected that file"):
        read_null(made / "parts", read_description(made / "parts"))


def test_options_that_say_nothing_are_refused(made, tmp_path, capsys):
    for more, message in (
        (("--texts", "words"), "texts: got 'words', expected one of captions, embeddings"),
        (
            ("--texts", "captions", "--text-encoder", "x"),
            "with texts captions, expected texts embeddings",
        ),
        (("--text-encoder", str(made / "in")), "in without text_encoder, expected a folder with"),
    ):
        assert cache(made, "sd", "x", *more) == 2
        assert message in capsys.readouterr().err
    assert not (made / "x").exists()


def test_one_caption_for_all_is_that_of_every_record(made):
    assert cache(made, "sd", "one", "--caption", "a small red circle") == 0
    source = LatentSource(str(made / "one"))
    assert {source[i]["caption"] for i in range(len(source))} == {"a small red circle"}
    np.testing.assert_array_equal(source[0]["states"], source[9]["states"])
    assert read_description(made / "one").source != read_description(made / "sd-float16").source


LEARNT = "embeddings of captions for a training of what text encoders say"


@pytest.mark.parametrize(
    ("train", "changes", "message"),
    [
        (Full(text_encoders=True), {}, LEARNT),
        (LoRA(text_target_modules=("q_proj",)), {}, LEARNT),
        (TextualInversion(placeholder_token="<x>", initializer_token="star"), {}, LEARNT),
        (LoRA(), {"text_encoders": ["0" * 16]}, "by text encoders with the digests 0{16}, expec"),
        (Full(), {"tokenizers": ["1" * 16]}, "by tokenizers with the digests 1{16}, expected"),
        (Full(), {"pooled_width": 8}, "with pooled embeddings, expected them without, as the UNet"),
        (Full(), {"vae": "2" * 16}, "encoded by a VAE with the digest 2{16}"),
    ],
)
def test_embeddings_that_are_not_the_trainings_are_refused(made, tmp_path, train, changes, message):
    shutil.copytree(made / "sd-float16", tmp_path / "l")
    path = tmp_path / "l" / "latents.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    base = load_base_model(objective_of(made, "sd", trainable=train))
    tuned = make_training_method(base, jnp.float32, None).partition
    data = DataConfig(kind="latents", path=str(tmp_path / "l"))
    with pytest.raises(InputError, match=message):
        check_latent_cache(data, base, tuned)


def test_captions_alone_are_refused_where_embeddings_are_asked_for(made):
    assert cache(made, "sd", "captions", "--texts", "captions") == 0
    base = load_base_model(objective_of(made, "sd"))
    data = DataConfig(kind="latents", path=str(made / "captions"), text_embeddings=True)
    with pytest.raises(InputError, match=r"data\.text_embeddings: got it for .*captions alone"):
        check_latent_cache(data, base, make_training_method(base, jnp.float32, None).partition)


def test_a_caption_of_its_own_needs_captions(made):
    base = load_base_model(objective_of(made, "sd"))
    data = DataConfig(kind="latents", path=str(made / "sd-float16"), caption="a star")
    with pytest.raises(InputError, match=r"data\.caption: got 'a star', expected it left out"):
        check_latent_cache(data, base, make_training_method(base, jnp.float32, "a star").partition)


def test_a_refused_training_leaves_no_workdir(made, tmp_path):
    path = tmp_path / "text.py"
    text = CONFIG.replace("FOLDER", str(made)).replace("import Data", "import Full, Data")
    path.write_text(text.replace("sample_steps=2", "trainable=Full(text_encoders=True)"))
    with pytest.raises(InputError, match=LEARNT):
        train([str(path), "--workdir", str(tmp_path / "w")])
    assert not (tmp_path / "w").exists()


def test_descriptions_without_texts_are_what_they_were(made):
    """A training on them goes on: its data's fingerprint is of the same words as ever."""
    described = read_description(made / "sd-float16")
    names = ("vae", "source", "resolution", "downscale", "channels", "dtype")
    sizes = ("heights", "widths", "items")
    old = LatentCacheInfo(**{name: getattr(described, name) for name in (*names, *sizes)})
    said = ", ".join(f"{name}={getattr(described, name)!r}" for name in (*names, *sizes))
    assert old.identity == f"Latents({said})"
    assert old.text_embedding_shapes == {}
    assert old != described
    with pytest.raises(InputError, match="got 1, 0 tokenizers, 0 tokens and 0 state_widths"):
        dataclasses.replace(old, text_encoders=("x",))


def test_numbers_that_a_dtype_lacks_are_not_stored():
    item = {"caption": "", "time_ids": np.zeros(6, np.int32)}
    mean = np.zeros((1, 1, 1), np.float32)
    said = {"states": np.full((2, 3), 7e4, np.float32)}
    with pytest.raises(
        InputError, match="got float16 for states up to 70000, expected a dtype of that range"
    ):
        pack_record(item, mean, mean, "float16", said)
    assert len(pack_record(item, mean, mean, "bfloat16", said)["states"]) == 12
