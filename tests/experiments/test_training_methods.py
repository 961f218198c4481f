"""Fine-tuning whole pipelines: resumed, exported, drawn again."""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from captioned_images import write_folder

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
from jaxdiff.experiments.loggers import read_lines
from jaxdiff.experiments.prior_preservation import prior_preservation_batches
from jaxdiff.experiments.training_methods import LORA
from jaxdiff.families.stable_diffusion import SD
from jaxdiff.models.build import param_dict, with_params
from jaxdiff.training.config import (
    DataConfig,
    DiffusionObjective,
    LoRA,
    TrainConfig,
)
from jaxdiff.training.objectives.trainable import (
    train_lora,
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


@pytest.mark.slow
def test_a_whole_pipeline_is_tuned_resumed_and_exported(folder):
    train = "trainable=Full(text_encoders=True), caption_dropout_per_encoder=(0.1, 0.2)"
    trained = {"unet", "text_encoder", "text_encoder_2"}
    model, work = "xl", "xl-tuned"
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
        still = STILL if component == "text_encoder" else ()
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
    base = load_base_model(DiffusionObjective(pipeline=str(folder / "sd")))
    networks = base.abstract_networks(np.float32)
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
    stored = {name: base.host_weights(name) for name in tuned.frozen}
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
    base = load_base_model(objective)
    texts = base.caption_tokenizer(data.caption)
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


@pytest.fixture(scope="module")
def short(folder):
    """The workdir of one step from which the averages have gone nine tenths of the way."""
    with jax.numpy_dtype_promotion("standard"):
        run(command(folder, "sd", "", "short", "--steps", "1", "--sample-every", "0"))
    return folder / "short"


@pytest.mark.slow
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


@pytest.mark.slow
def test_weights_are_exported_averaged_or_as_they_are(folder, short, tmp_path):
    """After one step: average = begun + 0.9 (trained - begun), by `ema_decay`."""
    before, after = tables(folder / "sd"), tables(short / "export")
    assert before.keys() == after.keys()
    for component, table in before.items():
        moved = {p for p, a in table.items() if not np.array_equal(a, after[component][p])}
        assert moved == (set(table) if component == "unet" else set()), component
    base, averaged = before["unet"], after["unet"]
    for flag, name in (("--no-ema", "raw"), ("--ema", "ema")):
        call = [str(short), str(tmp_path / name), flag, "--dtype", "float32"]
        assert main.run("export", call) == 0
    raw, again = (tables(tmp_path / name)["unet"] for name in ("raw", "ema"))
    for path, start in base.items():
        np.testing.assert_array_equal(again[path], averaged[path])
        moved = np.asarray(raw[path]) - start
        np.testing.assert_allclose(averaged[path] - start, 0.9 * moved, rtol=1e-3, atol=1e-6)
    assert np.abs(np.asarray(raw["conv_in.kernel"]) - base["conv_in.kernel"]).max() > 1e-3
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
