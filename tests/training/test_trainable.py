"""Fine-tuning whole pipelines: what is trained and what is not, resumed, exported, drawn again."""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from captioned_images import write_folder
from tiny_training import OBJECTIVE, frozen, networks

import jaxdiff
from jaxdiff.checkpoints.pipelines import read_pipeline
from jaxdiff.checkpoints.training_state import has_checkpoint
from jaxdiff.checkpoints.weights import read_weights
from jaxdiff.cli import main
from jaxdiff.cli.train import run
from jaxdiff.core.errors import InputError
from jaxdiff.data.texts import CaptionTokenizer
from jaxdiff.experiments import diffusion
from jaxdiff.experiments.base_model import load_base_model
from jaxdiff.experiments.prior_preservation import prior_preservation_batches
from jaxdiff.experiments.training_methods import LORA
from jaxdiff.families.stable_diffusion import SD
from jaxdiff.models.build import param_dict, with_params
from jaxdiff.models.clip import TOKEN_EMBEDDING
from jaxdiff.models.unet.module import UNet2DConditionModel
from jaxdiff.nn.layers import LayerFactory
from jaxdiff.nn.lora import LoRAConv, LoRALinear
from jaxdiff.training.config import (
    DataConfig,
    DiffusionObjective,
    Full,
    LoRA,
    TextualInversion,
    TrainConfig,
    resume_identity,
)
from jaxdiff.training.jsonl_log import read_lines
from jaxdiff.training.objectives.diffusion import diffusion_task
from jaxdiff.training.objectives.trainable import (
    train_denoiser,
    train_denoiser_and_text_encoders,
    train_lora,
    train_textual_inversion,
)

pytestmark = pytest.mark.usefixtures("standard_promotion")

CONFIG = """
from jaxdiff.training.config import *
data = DataConfig(kind="folder", path="FOLDER/pictures", resolution=16, bucket_multiple=16,
    validation_size=4,
    cache_dir="FOLDER/cache")
objective = DiffusionObjective(pipeline="FOLDER/MODEL", sample_steps=2, TRAIN)
config = TrainConfig(objective=objective, data=data, batch_size=8, steps=4, log_every=1,
    optimiser=OptimiserConfig(learning_rate=1e-2, warmup_steps=1, decay_fraction=0),
    checkpoint_every=2, sample_every=4)
"""


@pytest.fixture(autouse=True, scope="module")
def few():
    """Few validation pictures."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(diffusion, "GRID_SIZE", 8)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with captioned pictures, and models of both families."""
    folder = tmp_path_factory.mktemp("tuning")
    write_folder(folder / "pictures", 24, sizes=((16, 16), (20, 16)))
    tiny.write_tiny(folder / "sd")
    tiny.write_xl(folder / "xl")
    return folder


def command(folder, model, train, workdir, *more):
    """The arguments that train `model` in `workdir`."""
    path = folder / f"{workdir}.py"
    text = CONFIG.replace("FOLDER", str(folder)).replace("MODEL", model).replace("TRAIN", train)
    path.write_text(text)
    return [str(path), "--workdir", str(folder / workdir), *more]


def tables(folder):
    """The weights of each component of a pipeline folder."""
    parts = read_pipeline(folder)
    return {name: param_dict(part.module) for name, part in parts.components.items()}


def draw(folder, **options):
    """A picture of the model in a folder."""
    pipe = tiny.first_devices(jaxdiff.load(folder, dtype="float32"), 1)
    return pipe("a small red circle", steps=2, seed=0, output="latent", **options).images


# What is after the states that the UNet is told.
STILL = ("text_model.encoder.layers.1.", "text_model.final_layer_norm.")
FULL = {
    "sd": ("sd", "", {"unet"}),
    "xl-text": (
        "xl",
        "trainable=Full(text_encoders=True), caption_dropout_per_encoder=(0.1, 0.2)",
        {"unet", "text_encoder", "text_encoder_2"},
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FULL)
def test_a_whole_pipeline_is_tuned_resumed_and_exported(folder, name):
    model, train, trained = FULL[name]
    work = f"{name}-tuned"
    arguments = command(folder, model, train, work)
    run(arguments)
    log = read_lines(folder / work / "log.jsonl")
    assert [line["step"] for line in log] == [1, 2, 3, 4]
    assert all(np.isfinite(line["loss"]) for line in log)
    assert np.isfinite(log[-1]["validation_loss"])
    assert (folder / work / "samples" / "step_000004.png").exists()

    before, after = tables(folder / model), tables(folder / work / "export")
    assert before.keys() == after.keys()
    for component, table in before.items():
        moved = {p for p, a in table.items() if not np.array_equal(a, after[component][p])}
        still = STILL if (model, component) == ("xl", "text_encoder") else ()
        heard = {path for path in table if not path.startswith(still)}
        assert moved == (heard if component in trained else set()), component
    stored, tuned = read_pipeline(folder / model), read_pipeline(folder / work / "export")
    assert tuned.scheduler == stored.scheduler
    assert (tuned.class_name, tuned.options) == (stored.class_name, stored.options)
    assert np.abs(draw(folder / work / "export") - draw(folder / model)).max() > 1e-3

    # from the checkpoint in the middle again, bit for bit
    shutil.rmtree(folder / work / "export")
    shutil.rmtree(folder / work / "checkpoints" / "4")
    assert has_checkpoint(folder / work / "checkpoints")
    run(arguments)
    again = tables(folder / work / "export")
    for component, table in after.items():
        for path, array in table.items():
            np.testing.assert_array_equal(again[component][path], array, err_msg=path)


ADDED = {
    "lora": (
        'trainable=LoRA(rank=3, alpha=6.0, target_modules=("to_q", "conv1"), '
        'text_target_modules=("q_proj", "fc1"))',
        LORA,
    ),
    "word": (
        'trainable=TextualInversion(placeholder_token="number", initializer_token="star", '
        "num_vectors=2)",
        "number.safetensors",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ADDED)
def test_small_additions_are_learnt_resumed_and_drawn_with(folder, name):
    train, file = ADDED[name]
    arguments = command(folder, "xl", train, name)
    run(arguments)
    export = folder / name / "export"
    assert [path.name for path in export.iterdir()] == [file]
    pipe = tiny.first_devices(jaxdiff.load(folder / "xl", dtype="float32"), 1)
    call = {"steps": 2, "seed": 0, "output": "latent"}
    before = pipe("a number", **call).images
    (pipe.load_lora if file == LORA else pipe.load_textual_inversion)(export / file)
    after = pipe("a number", **call).images
    assert np.abs(after - before).max() > 1e-3

    assert main.run("export", [str(folder / name), str(folder / "half")]) == 0
    stored = read_weights(folder / "half" / file)
    assert stored.keys() == read_weights(export / file).keys()
    assert {entry.dtype for entry in stored.values()} == {"F16"}

    written = (export / file).read_bytes()
    shutil.rmtree(export)
    shutil.rmtree(folder / name / "checkpoints" / "4")
    run(arguments)
    assert (export / file).read_bytes() == written


def test_a_lora_begins_as_the_model_and_names_its_layers(folder):
    """Nothing is changed by factors of which one is zero, whatever the other is."""
    begun = load_base_model(DiffusionObjective(pipeline=str(folder / "sd")))
    networks = begun.abstract_networks(np.float32)
    config = LoRA(
        rank=2,
        target_modules=("attn1.to_q", "ff.net.0.proj", "conv1"),
        text_target_modules=("fc1",),
    )
    tuned = train_lora(SD, networks, config)
    params = dict(tuned.init(0))
    assert params.keys() == tuned.shapes.keys()
    assert {path.split(".")[0] for path in params} == {"unet", "text_encoder"}
    ends = {path.rsplit(".lora_", 1)[0].rsplit(".", 1)[1] for path in params}
    assert ends == {"to_q", "proj", "conv1", "fc1"}
    stored = {name: begun.host_weights(name) for name in tuned.frozen}
    told = jnp.ones((1, 8, 8, 4)), jnp.ones(1), jnp.ones((1, 12, 8))

    @jax.jit
    def outputs(params, stored):
        tables = tuned.merge(params, stored)
        plain = with_params(networks["unet"], stored["unet"])(*told)
        return plain, with_params(tuned.networks["unet"], tables["unet"])(*told)

    plain, adapted = outputs(params, stored)
    np.testing.assert_array_equal(adapted, plain)
    other = {path: array + 1 for path, array in params.items()}
    assert np.abs(outputs(other, stored)[1] - plain).max() > 1e-2


def tuned_by(kind, given):
    """The smallest networks tuned in one of the ways, which begin with the tables `given`."""
    if kind == "unet":
        return train_denoiser(SD, networks(), lambda: given)
    if kind == "encoders":
        return train_denoiser_and_text_encoders(SD, networks(), lambda: given)
    if kind == "lora":
        return train_lora(SD, networks(), LoRA(rank=2, text_target_modules=("q_proj", "fc1")))
    return train_textual_inversion(
        SD, networks(), 2, {"text_encoder": 20}, lambda: {"text_encoder": np.ones((2, 8))}
    )


@pytest.mark.parametrize("kind", ["unet", "encoders", "lora", "word"])
def test_one_batch_is_learnt_and_nothing_else_changes(kind):
    """Of the weights of the whole only those that are parameters are others afterwards."""
    still = frozen()
    unet = param_dict(tiny.random_component(UNet2DConditionModel, OBJECTIVE.model, seed=2).module)
    given = {**still.weights, "unet": unet}
    tuned = tuned_by(kind, given)
    still = still._replace(weights={name: given[name] for name in tuned.frozen})
    learn = diffusion_task(dataclasses.replace(OBJECTIVE, caption_dropout=0.0), tuned)
    rng = np.random.default_rng(0)
    ids = jnp.asarray([[18, 20, 21, 19, 19], [18, 21, 3, 20, 19]])
    image = jnp.asarray(np.tanh(rng.normal(size=(2, 8, 8, 3))), jnp.float32)
    descent = optax.adam(1e-2)

    @jax.jit
    def step(params, state):
        value, slope = jax.value_and_grad(
            lambda p: learn.loss(p, still, {"image": image, "ids": ids}, jax.random.key(1))[0]
        )(params)
        updates, state = descent.update(slope, state)
        return optax.apply_updates(params, updates), state, value

    begun = {path: jnp.asarray(array) for path, array in learn.init(0)}
    assert {path: array.shape for path, array in begun.items()} == {
        path: leaf.shape for path, leaf in learn.shapes.items()
    }
    params, state, losses = begun, descent.init(begun), []
    for _ in range(12):
        params, state, value = step(params, state)
        losses.append(float(value))
    assert losses[-1] < losses[0] * (0.999 if kind == "word" else 0.95)

    before, after = (tuned.merge(table, still.weights) for table in (begun, params))
    changed = {
        f"{name}.{path}"
        for name, table in before.items()
        for path, array in table.items()
        if not np.array_equal(array, after[name][path])
    }
    names = {
        "unet": {f"unet.{path}" for path in begun},
        "word": {"text_encoder." + TOKEN_EMBEDDING},
    }
    assert changed == names.get(kind, set(begun))
    if kind == "word":
        rows = after["text_encoder"][TOKEN_EMBEDDING]
        np.testing.assert_array_equal(rows[:20], given["text_encoder"][TOKEN_EMBEDDING])
        np.testing.assert_array_equal(rows[20:], params["text_encoder.vectors"])
        assert np.all(np.any(rows[20:] != 1, axis=1))


@pytest.mark.parametrize("conv", [False, True])
def test_low_rank_layers_add_the_product_of_their_factors(conv):
    layers, rng = LayerFactory(rngs=None), np.random.default_rng(0)
    layer = layers.conv(3, 6, 3, stride=2) if conv else layers.linear(3, 6)
    changed = (LoRAConv if conv else LoRALinear)(layer, 2, 0.5)
    table = {
        path: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32)
        for path, leaf in param_dict(changed).items()
    }
    x = jnp.asarray(rng.normal(size=(2, 5, 5, 3)), jnp.float32)
    down, up = table["lora_A.kernel"], table["lora_B.kernel"]
    delta = 0.5 * down.reshape(-1, 2) @ up.reshape(2, 6)
    merged = {"kernel": table["kernel"] + delta.reshape(table["kernel"].shape)}
    expected = with_params(layer, {**merged, "bias": table["bias"]})
    network = with_params(changed, table)
    np.testing.assert_allclose(network(x), expected(x), rtol=1e-4, atol=1e-5)
    if not conv:
        halves = jnp.concatenate(network.split_outputs(x), axis=-1)
        np.testing.assert_allclose(halves, expected(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("model", "train", "message"),
    [
        (
            "sd",
            'trainable=LoRA(target_modules=("to_w",))',
            r"trainable\.target_modules: got 'to_w'",
        ),
        (
            "sd",
            'trainable=LoRA(target_modules=("norm1",))',
            r"trainable\.target_modules: got 'norm1'",
        ),
        (
            "sd",
            'trainable=TextualInversion(placeholder_token="<x>", initializer_token="a red circle")',
            r"trainable\.initializer_token: got 'a red circle', which is 3 tokens",
        ),
        (
            "sd",
            'trainable=TextualInversion(placeholder_token="<x>", initializer_token="star")',
            r"trainable\.placeholder_token: got '<x>', which no caption has",
        ),
    ],
)
def test_what_the_networks_do_not_have_is_refused(folder, model, train, message):
    with pytest.raises(InputError, match=message):
        run(command(folder, model, train, "refused"))
    assert not (folder / "refused").exists()


def test_a_prior_takes_turns_and_weighs(folder, tmp_path):
    """Half of each batch is the second source's, and the loss is a sum of two means."""
    write_folder(tmp_path / "class", 16, sizes=((16, 16),))
    data = DataConfig(
        kind="folder",
        path=str(folder / "pictures"),
        resolution=16,
        bucket_multiple=16,
        validation_size=4,
        caption="a red star",
    )
    prior = dataclasses.replace(data, path=str(tmp_path / "class"), caption="a star")
    objective = DiffusionObjective(
        pipeline=str(folder / "sd"), prior_data=prior, prior_loss_weight=0.25
    )
    config = TrainConfig(objective=objective, data=data, batch_size=8, steps=1)
    begun = load_base_model(objective)
    texts = begun.caption_tokenizer(data.caption)
    stream = prior_preservation_batches(config, prior, objective.prior_loss_weight, texts)
    batch = next(stream)
    ids = texts([""])["ids"][0], CaptionTokenizer(tokenizers=texts.tokenizers)(["a star"])["ids"][0]
    assert not np.array_equal(batch["ids"][0], ids[1])
    np.testing.assert_array_equal(batch["ids"][0::2], np.tile(ids[0], (4, 1)))
    np.testing.assert_array_equal(batch["ids"][1::2], np.tile(ids[1], (4, 1)))
    np.testing.assert_array_equal(batch["weight"], [2, 0.5] * 4)
    position = stream.get_state()
    following = next(stream)
    other = prior_preservation_batches(config, prior, objective.prior_loss_weight, texts)
    other.set_state(position)
    again = next(other)
    for name, values in following.items():
        np.testing.assert_array_equal(again[name], values)
    assert other.identity["prior data"] != other.identity["data"]
    for each in (stream, other):
        each.close()

    with pytest.raises(InputError, match=r"batch_size: got 7, expected an even number"):
        prior_preservation_batches(dataclasses.replace(config, batch_size=7), prior, 1.0, texts)
    small = dataclasses.replace(prior, resolution=32)
    with pytest.raises(InputError, match=r"objective\.prior_data\.resolution: got 32, expected 16"):
        prior_preservation_batches(config, small, 1.0, texts)


def test_weights_of_pictures_weigh_their_losses():
    params = {path: jnp.asarray(array) for path, array in train_denoiser(SD, networks()).init(0)}
    learn = diffusion_task(OBJECTIVE, train_denoiser(SD, networks()))
    rng = np.random.default_rng(0)
    batch = {
        "image": jnp.asarray(rng.uniform(-1, 1, (4, 8, 8, 3)), jnp.float32),
        "ids": jnp.full((4, 5), 3),
    }
    loss = jax.jit(learn.loss)
    key, still = jax.random.key(0), frozen()
    each = [loss(params, still, batch | {"weight": jnp.eye(4)[i]}, key)[0] for i in range(4)]
    weight = jnp.asarray([2, 0.5, 2, 0.5])
    together, _ = loss(params, still, batch | {"weight": weight}, key)
    np.testing.assert_allclose(together, np.dot(weight, each), rtol=1e-5)
    plain, _ = loss(params, still, batch, key)
    np.testing.assert_allclose(plain, sum(each), rtol=1e-5)


PIPELINE = DiffusionObjective(pipeline="a")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pipeline": None}, r"objective\.vae: got none, expected it or a pipeline"),
        ({"vae": "b"}, r"objective\.vae: got one besides objective\.pipeline"),
        ({"weights": "b"}, r"objective\.weights: got one beside"),
        ({"prediction_type": "epsilon"}, r"objective\.prediction_type: got one beside"),
        ({"caption_dropout_per_encoder": (0.1, 2.0)}, r"objective\.caption_dropout: got 2\.0"),
        (
            {"prior_loss_weight": 2.0},
            r"objective\.prior_loss_weight: got 2\.0 without objective\.prior_data",
        ),
        (
            {"pipeline": None, "vae": "b", "text_encoder": "c", "trainable": LoRA()},
            r"objective\.trainable: got LoRA for a new UNet",
        ),
    ],
    ids=str,
)
def test_impossible_tunings_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        dataclasses.replace(PIPELINE, **changes)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LoRA(rank=0), r"objective\.trainable\.rank: got 0"),
        (lambda: LoRA(alpha=0.0), r"objective\.trainable\.alpha: got 0"),
        (lambda: LoRA(target_modules=()), r"objective\.trainable\.target_modules: got none"),
        (
            lambda: TextualInversion(placeholder_token="a b", initializer_token="c"),
            r"objective\.trainable\.placeholder_token: got 'a b'",
        ),
        (
            lambda: TextualInversion(placeholder_token="x", initializer_token="c", num_vectors=0),
            r"trainable\.num_vectors: got 0",
        ),
    ],
)
def test_impossible_kinds_are_refused(make, message):
    with pytest.raises(InputError, match=message):
        make()


def test_identity_is_what_is_trained_and_leaves_to_the_pipeline_what_it_says():
    config = TrainConfig(objective=PIPELINE, steps=1, batch_size=8, data=DataConfig())
    now = resume_identity(config)
    assert now["objective.trainable"] == "Full"
    assert not any(name.startswith("objective.model") for name in now)
    for train in (Full(text_encoders=True), LoRA(), LoRA(rank=2)):
        other = dataclasses.replace(PIPELINE, trainable=train)
        assert resume_identity(dataclasses.replace(config, objective=other)) != now


@pytest.fixture(scope="module")
def short(folder):
    """The workdir of one step from which the averages have gone nine tenths of the way."""
    with jax.numpy_dtype_promotion("standard"):
        run(command(folder, "sd", "", "short", "--steps", "1", "--sample-every", "0"))
    return folder / "short"


def test_another_pipeline_or_tuning_in_the_same_workdir_is_refused(folder, short):
    shutil.copytree(folder / "sd", folder / "copy")
    file = folder / "copy" / "unet" / "diffusion_pytorch_model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(InputError, match=r"weights of unet: got .* as trained so far"):
        run(command(folder, "copy", "", "short"))
    with pytest.raises(
        InputError, match=r"objective\.trainable: got LoRA, expected Full as trained"
    ):
        run(command(folder, "sd", "trainable=LoRA()", "short"))


def test_weights_are_exported_averaged_or_as_they_are(folder, short, tmp_path):
    """After one step: average = begun + 0.9 (trained - begun), by `ema.decay_at`."""
    begun, averaged = tables(folder / "sd")["unet"], tables(short / "export")["unet"]
    for flag, name in (("--no-ema", "raw"), ("--ema", "ema")):
        call = [str(short), str(tmp_path / name), flag, "--dtype", "float32"]
        assert main.run("export", call) == 0
    raw, again = (tables(tmp_path / name)["unet"] for name in ("raw", "ema"))
    for path, start in begun.items():
        np.testing.assert_array_equal(again[path], averaged[path])
        moved = np.asarray(raw[path]) - start
        np.testing.assert_allclose(averaged[path] - start, 0.9 * moved, rtol=1e-3, atol=1e-6)
    assert np.abs(np.asarray(raw["conv_in.kernel"]) - begun["conv_in.kernel"]).max() > 1e-3
    # what is not there yet is made of the newest checkpoint
    shutil.move(short / "export", tmp_path / "aside")
    assert main.run("export", [str(short), str(tmp_path / "made"), "--dtype", "float32"]) == 0
    shutil.move(tmp_path / "aside", short / "export")
    for path, array in tables(tmp_path / "made")["unet"].items():
        np.testing.assert_array_equal(array, averaged[path])


def test_a_folder_without_checkpoints_has_no_other_weights(folder, tmp_path, capsys):
    assert main.run("export", [str(folder / "sd"), str(tmp_path / "out"), "--no-ema"]) == 2
    assert "ema: got false for" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("train", "message"),
    [
        (
            "caption_dropout_per_encoder=(0.1, 0.1)",
            "got 2 rates, expected none for one text encoder",
        ),
        ("caption_dropout_per_encoder=(0.1,)", "got 1 rates, expected none for one text encoder"),
    ],
)
def test_what_does_not_fit_the_pipeline_is_refused(folder, train, message):
    with pytest.raises(InputError, match=message):
        run(command(folder, "sd", train, "refused"))
    assert not (folder / "refused").exists()
