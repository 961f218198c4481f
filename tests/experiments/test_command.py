"""The train command on tiny models: from nothing to a folder that draws, and its errors."""

import errno
import json
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from etils import epath
from PIL import Image

from jaxdiff.checkpoints.components import read_component
from jaxdiff.checkpoints.jsonfiles import read_object
from jaxdiff.checkpoints.pipelines import read_pipeline
from jaxdiff.cli import main
from jaxdiff.cli.train import load_config, parse, run
from jaxdiff.core.configs import to_mapping
from jaxdiff.core.errors import InputError
from jaxdiff.experiments import clip, evaluation, experiment, vae
from jaxdiff.experiments.loggers import read_lines
from jaxdiff.experiments.workdir import check_identity, lock_workdir
from jaxdiff.models.build import param_dict
from jaxdiff.models.prompt_labels import PROMPT_LABELS
from jaxdiff.models.unet.config import UNet2DConditionConfig
from jaxdiff.scenes.labels import ATTRIBUTES, GRAMMAR

pytestmark = pytest.mark.usefixtures("standard_promotion")

VAE = """
from jaxdiff.models.vae import AutoencoderKLConfig
from jaxdiff.training.config import TrainConfig, VAEObjective
model = AutoencoderKLConfig(
    down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
    block_out_channels=(2, 2, 4), norm_num_groups=2, latent_channels=2, sample_size=64,
    mid_block_add_attention=False,
)
config = TrainConfig(objective=VAEObjective(model=model), steps=3, batch_size=8,
    log_every=2, checkpoint_every=2, sample_every=2)
"""
CLIP = """
from jaxdiff.models.unet.config import UNet2DConditionConfig
from jaxdiff.models.clip_config import CLIPTextConfig, CLIPVisionConfig
from jaxdiff.training.config import CLIPObjective, DataConfig, TrainConfig
sizes = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
text = CLIPTextConfig(vocab_size=600, max_position_embeddings=32, **sizes)
vision = CLIPVisionConfig(image_size=64, patch_size=32, **sizes)
config = TrainConfig(objective=CLIPObjective(text=text, vision=vision, projection_dim=4),
    data=DataConfig(variations=4), steps=1, batch_size=8)
"""
UNET = """
from jaxdiff.models.unet.config import UNet2DConditionConfig
from jaxdiff.training.config import DiffusionObjective, TrainConfig
model = UNet2DConditionConfig(
    sample_size=16, in_channels=2, out_channels=2, block_out_channels=(4,), layers_per_block=1,
    down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
    norm_num_groups=2, cross_attention_dim=8, attention_head_dim=1,
)
objective = DiffusionObjective(
    model=model, vae="FOLDER/vae/export", text_encoder="FOLDER/clip/export", sample_steps=2)
config = TrainConfig(objective=objective, steps=1, batch_size=8, sample_every=1)
"""
DISTILLED = """
from jaxdiff.training.config import DistillationObjective, TrainConfig
objective = DistillationObjective(
    teacher="FOLDER/unet/export", guidance_embedding_dim=4, sample_steps=2)
config = TrainConfig(objective=objective, steps=1, batch_size=8, sample_every=1)
"""
CLASSIFIER = """
from jaxdiff.checkpoints.jsonfiles import read_object
from jaxdiff.core.configs import to_mapping
from jaxdiff.models.prompt_labels import PROMPT_LABELS
from jaxdiff.scenes.labels import ATTRIBUTES, GRAMMAR
from jaxdiff.models.classifier import LatentClassifierConfig
from jaxdiff.training.config import ClassifierObjective, OptimiserConfig, TrainConfig
model = LatentClassifierConfig(
    sample_size=16, in_channels=2, block_out_channels=(4,), layers_per_block=1,
    attention_head_dim=4, norm_num_groups=2,
).with_labels(ATTRIBUTES)
objective = ClassifierObjective(model=model, vae="FOLDER/vae/export", noise_levels_per_image=2)
config = TrainConfig(objective=objective, optimiser=OptimiserConfig(warmup_steps=1),
    steps=4, batch_size=8, log_every=1, checkpoint_every=2, sample_every=4)
"""


@pytest.fixture(autouse=True, scope="module")
def few():
    """Measures on few pictures, a tokenizer from few captions."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experiment, "VALIDATION_BATCH", 16)
        patch.setattr(evaluation, "DEFAULT_EVAL_IMAGES", 16)
        patch.setattr(vae, "SCALE_ESTIMATION_IMAGES", 64)
        patch.setattr(clip, "NUM_TOKENIZER_CAPTIONS", 300)
        yield


@pytest.fixture(scope="module")
def trained(tmp_path_factory, few):
    """A folder with the config and the finished workdir of a VAE."""
    folder = tmp_path_factory.mktemp("trained")
    with jax.numpy_dtype_promotion("standard"):
        run([config_file(folder), "--workdir", str(folder / "vae")])
    return folder


@pytest.fixture(scope="module")
def three(trained):
    """The same folder with the finished workdirs of a text encoder and a UNet too."""
    with jax.numpy_dtype_promotion("standard"):
        for name, text in (("clip", CLIP), ("unet", UNET)):
            run([config_file(trained, text, f"{name}.py"), "--workdir", str(trained / name)])
    return trained


@pytest.fixture
def again(trained, tmp_path):
    """The command that trained the VAE, on a copy of its workdir."""
    shutil.copytree(trained / "vae", tmp_path / "vae")
    return [str(trained / "tiny.py"), "--workdir", str(tmp_path / "vae")]


def config_file(folder, text=VAE, name="tiny.py"):
    """Write a config and return its path."""
    path = folder / name
    path.write_text(text.replace("FOLDER", str(folder)))
    return str(path)


def size_of(path):
    """Width and height of a picture."""
    with Image.open(path) as image:
        return image.size


def test_log_and_samples(trained):
    log = read_lines(trained / "vae/log.jsonl")
    assert [line["step"] for line in log] == [2, 3]
    wanted = {"loss", "grad_norm", "learning_rate", "step_ms", "images_per_s", "validation_psnr"}
    assert wanted <= set(log[0])
    assert size_of(trained / "vae/samples/step_000002.png") == (16 * 64, 2 * 64)


@pytest.mark.slow
def test_three_trainings_make_a_pipeline(three):
    (line,) = read_lines(three / "clip/log.jsonl")
    assert {"validation_retrieval", "validation_retrieval_hard"} <= set(line)
    read, whole = (
        param_dict(read_component(three / f"clip/export/{name}").module)
        for name in ("text_encoder", "clip")
    )
    assert all(np.array_equal(array, whole[path]) for path, array in read.items())
    said = json.loads((three / "clip/export/clip/preprocessor_config.json").read_text())
    assert said == {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (line,) = read_lines(three / "unet/log.jsonl")
    assert np.isfinite(line["validation_loss"])
    assert line["validation_fid"] > 0
    assert 0 <= line["validation_all_correct"] <= 1
    assert size_of(three / "unet/samples/step_000001.png") == (8 * 64, 2 * 64)

    parts = read_pipeline(three / "unet/export")
    assert set(parts.components) == {"unet", "vae", "text_encoder"}
    assert parts.scheduler["prediction_type"] == "v_prediction"
    assert parts.defaults == {"guidance_scale": 5.0, "steps": 2, "sampler": "ddim"}
    text = parts.components["text_encoder"].module.config
    assert text.eos_token_id == text.vocab_size - 1


def test_latents_of_the_exported_vae_have_unit_variance(trained):
    module = read_component(trained / "vae/export").module
    config = load_config(trained / "tiny.py")
    images = jnp.asarray(experiment.validation_batch(config)["image"])
    mean, logvar = jax.jit(lambda images: module.encode(images))(images)
    variance = np.var(np.asarray(mean)) + np.exp(np.asarray(logvar)).mean()
    np.testing.assert_allclose(variance * module.config.scaling_factor**2, 1, rtol=0.1)


def test_export_only_writes_the_newest_checkpoint(trained, again, tmp_path):
    shutil.rmtree(tmp_path / "vae/export")
    run([*again, "--export-only", "--steps", "99"])
    file = "vae/export/diffusion_pytorch_model.safetensors"
    assert (tmp_path / file).read_bytes() == (trained / file).read_bytes()
    kept = (tmp_path / "vae/config.json").read_text()
    assert kept == (trained / "vae/config.json").read_text()


def test_nothing_to_export_is_refused(tmp_path):
    assert not (tmp_path / "w").exists()
    with pytest.raises(InputError, match="without a checkpoint, expected one to export"):
        run([config_file(tmp_path), "--workdir", str(tmp_path / "w"), "--export-only"])


def test_another_model_in_the_same_workdir_is_refused(again):
    with pytest.raises(InputError, match=r"latent_channels: got 3, expected 2 as trained so far"):
        run([*again, "--objective.model.latent-channels", "3"])


def test_all_that_differs_is_said(again):
    flags = ["--seed", "5", "--objective.model.latent-channels", "3"]
    with pytest.raises(
        InputError, match=r"latent_channels: got 3, expected 2; seed: got 5, expected 0 as trained"
    ):
        run([*again, *flags])


@pytest.mark.slow
def test_a_full_disk_is_one_error_and_keeps_what_was_good(again, tmp_path, capsys, monkeypatch):
    def full(path, *_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(type(epath.Path()), "write_text", full)
    with pytest.raises(SystemExit) as stopped:
        run([*again, "--steps", "9"])
    assert stopped.value.code == 1
    said = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("step")]
    assert said[-1] == (
        "train: checkpoint 4: got no space left on device, expected a disk that can be written; "
        "training stopped. The last good checkpoint is of step 3: the same command resumes from "
        "there"
    )
    assert len(said) == 2, said  # the other: resuming after step 3
    assert {path.name for path in (tmp_path / "vae" / "checkpoints").glob("?")} == {"2", "3"}
    with pytest.raises(SystemExit):
        run([again[0], "--workdir", str(tmp_path / "new")])
    assert "There is no checkpoint yet: the same command starts over" in capsys.readouterr().err


@pytest.mark.slow
def test_another_seed_or_other_frozen_weights_are_refused(again, three, tmp_path):
    with pytest.raises(InputError, match=r"seed: got 5, expected 0 as trained so far"):
        run([*again, "--seed", "5"])
    shutil.copytree(three, tmp_path / "copy")
    path = tmp_path / "unet.py"
    path.write_text(UNET.replace("FOLDER", str(tmp_path / "copy")))
    file = tmp_path / "copy" / "vae" / "export" / "diffusion_pytorch_model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(InputError, match=r"weights of vae: got .* as trained so far"):
        run([str(path), "--workdir", str(tmp_path / "copy" / "unet")])


def test_a_workdir_without_a_checkpoint_takes_another_model(tmp_path):
    (tmp_path / "w").mkdir()
    (tmp_path / "w" / "config.json").write_text('{"identity": {"objective.model.sample_size": 1}}')
    check_identity({"objective.model.sample_size": 2}, tmp_path / "w")
    (tmp_path / "w" / "checkpoints" / "3").mkdir(parents=True)
    with pytest.raises(InputError, match="got 2, expected 1 as trained so far"):
        check_identity({"objective.model.sample_size": 2}, tmp_path / "w")
    (tmp_path / "w" / "config.json").write_text("{}")
    with pytest.raises(InputError, match="got no identity"):
        check_identity({}, tmp_path / "w")


def test_two_trainings_do_not_share_a_workdir(tmp_path):
    with (
        lock_workdir(tmp_path / "w"),
        pytest.raises(InputError, match="where a training is running"),
        lock_workdir(tmp_path / "w"),
    ):
        pass
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(InputError, match="file: got file exists, expected a folder"),
        lock_workdir(tmp_path / "file"),
    ):
        pass


@pytest.mark.slow
def test_a_training_begins_with_given_weights(three, tmp_path):
    path = tmp_path / "unet.py"
    path.write_text(UNET.replace("FOLDER", str(three)))
    given = three / "unet" / "export" / "unet"
    more = ["--objective.weights", str(given), "--optimiser.learning-rate", "1e-30"]
    run([str(path), "--workdir", str(tmp_path / "w"), *more])
    initial = param_dict(read_component(given).module)
    ended = param_dict(read_component(tmp_path / "w" / "export" / "unet").module)
    for name, values in initial.items():
        np.testing.assert_allclose(ended[name], values, rtol=1e-6, atol=1e-20)
    other = ["--objective.model.time-embedding-dim", "8", "--objective.weights", str(given)]
    message = r"objective\.weights: got .* with \S*time_emb\S* \(.*\), expected \(.*8.*\) as"
    with pytest.raises(InputError, match=message):
        run([str(path), "--workdir", str(tmp_path / "v"), *other])
    assert not (tmp_path / "v").exists()


@pytest.mark.slow
def test_guidance_is_distilled_into_a_pipeline(three, tmp_path):
    command = [config_file(tmp_path, DISTILLED.replace("FOLDER", str(three))), "--workdir"]
    run([*command, str(tmp_path / "w")])
    (line,) = read_lines(tmp_path / "w" / "log.jsonl")
    assert np.isfinite(line["validation_relative_error"])
    assert size_of(tmp_path / "w" / "samples/step_000001.png") == (8 * 64, 2 * 64)
    taught = read_pipeline(tmp_path / "w" / "export").components["unet"].module
    assert taught.config.time_cond_proj_dim == 4
    # begun with the teacher, of which one step changes little
    initial = param_dict(read_component(three / "unet/export/unet").module)
    ended = param_dict(taught)
    assert set(ended) - set(initial) == {"time_embedding.cond_proj.kernel"}
    for path, array in initial.items():
        np.testing.assert_allclose(ended[path], array, atol=1e-4)


@pytest.mark.slow
def test_a_classifier_is_trained_resumed_and_exported(trained, tmp_path):
    command = [config_file(tmp_path, CLASSIFIER.replace("FOLDER", str(trained))), "--workdir"]
    run([*command, str(tmp_path / "w")])
    log = read_lines(tmp_path / "w" / "log.jsonl")
    assert [line["step"] for line in log] == [1, 2, 3, 4]
    parts = [log[0][f"nats_{name}"] for name in ATTRIBUTES.slices]
    np.testing.assert_allclose(log[0]["loss"], sum(parts), rtol=1e-5)
    measured = {f"validation_{n}_{t}" for n in ATTRIBUTES.slices for t in (0, 250, 500, 750, 950)}
    assert {name for name in log[3] if name.startswith("validation")} == {
        *measured,
        "validation_loss",
    }
    assert all(0 <= log[3][name] <= 1 for name in measured)

    folder = tmp_path / "w" / "export" / "classifier"
    whole = read_component(folder).module
    assert whole.config.attributes == ATTRIBUTES
    assert read_object(folder / PROMPT_LABELS) == json.loads(json.dumps(to_mapping(GRAMMAR)))
    # from the checkpoint in the middle again
    shutil.rmtree(tmp_path / "w" / "export")
    shutil.rmtree(tmp_path / "w" / "checkpoints" / "4")
    run([*command, str(tmp_path / "w")])
    for name, values in param_dict(read_component(folder).module).items():
        np.testing.assert_allclose(values, param_dict(whole)[name], rtol=1e-4, atol=1e-6)
    assert [line["step"] for line in read_lines(tmp_path / "w" / "log.jsonl")] == [1, 2, 3, 4]

    assert main.run("export", [str(tmp_path / "w"), str(tmp_path / "out")]) == 0
    half = param_dict(read_component(tmp_path / "out" / "classifier").module)
    assert {str(array.dtype) for array in half.values()} == {"float16"}
    exported = tmp_path / "out" / "classifier" / PROMPT_LABELS
    assert read_object(exported) == read_object(folder / PROMPT_LABELS)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--objective.model.sample-size", "8"], "sample_size: got 8, expected 16 as the latents"),
        (["--objective.model.in-channels", "4"], "in_channels: got 4, expected 2 as the latents"),
    ],
)
def test_a_classifier_of_other_latents_is_refused(trained, tmp_path, flags, message):
    path = config_file(tmp_path, CLASSIFIER.replace("FOLDER", str(trained)))
    with pytest.raises(InputError, match=f"objective.model.{message}"):
        run([path, "--workdir", str(tmp_path / "w"), *flags])
    other = CLASSIFIER.replace("FOLDER", str(trained)).replace(".with_labels(ATTRIBUTES)", "")
    with pytest.raises(InputError, match=r"group_names: got class, expected the groups of scenes"):
        run([config_file(tmp_path, other), "--workdir", str(tmp_path / "w")])
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize("field", ["sample-size", "in-channels", "out-channels"])
def test_a_unet_for_other_latents_is_refused(trained, tmp_path, field):
    path = tmp_path / "unet.py"
    text = UNET.replace("FOLDER/clip/export", str(tiny.write_tiny(tmp_path / "model")))
    path.write_text(text.replace("FOLDER", str(trained)))
    arguments = [str(path), "--workdir", str(tmp_path / "w"), f"--objective.model.{field}", "8"]
    name = field.replace("-", "_")
    with pytest.raises(InputError, match=f"objective.model.{name}: got 8, expected .* as the lat"):
        run(arguments)


@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_and_keeps_what_was_good(again, tmp_path, capsys):
    wild = ["--optimiser.learning-rate", "1e38", "--optimiser.warmup-steps", "0", "--steps", "9"]
    wild += ["--max-nonfinite-steps", "4"]
    with pytest.raises(SystemExit) as stopped:
        run([*again, *wild])
    assert stopped.value.code == 1
    said = capsys.readouterr().err
    assert "train: steps 4 to 7 were skipped: param_norm " in said
    assert "training stopped. The last good checkpoint is of step 6" in said
    log = read_lines(tmp_path / "vae/log.jsonl")
    assert [(line["step"], line["nonfinite_steps"]) for line in log] == [
        (2, 0),
        (3, 0),
        (4, 1),
        (6, 2),
    ]


@pytest.mark.parametrize(("count", "shards"), [(16, 8), (9, 1)])
def test_validation_is_spread_over_the_devices_that_divide_it(count, shards):
    (array,) = experiment.shard_or_replicate({"x": np.arange(count)}).values()
    assert len(array.sharding.device_set) == 8
    assert array.addressable_shards[0].data.shape == (count // shards,)


def test_a_batch_that_the_devices_cannot_share_is_refused(tmp_path):
    arguments = [config_file(tmp_path), "--workdir", str(tmp_path / "w")]
    with pytest.raises(InputError, match=f"expected a multiple of the {len(jax.devices())} dev"):
        run([*arguments, "--batch-size", "12"])


def test_a_refused_training_leaves_nothing_behind(tmp_path, capsys):
    path = tmp_path / "unet.py"
    path.write_text(UNET.replace("FOLDER", str(tmp_path / "missing")))
    workdir = tmp_path / "runs" / "unet"
    assert main.run("train", [str(path), "--workdir", str(workdir)]) == 2
    assert str(tmp_path / "missing" / "vae" / "export") in capsys.readouterr().err
    assert not workdir.parent.exists()


def test_flags_override_fields(tmp_path):
    path = config_file(tmp_path)
    options = parse([path, "--workdir", "w", "--optimiser.learning-rate", "0.5", "--steps", "7"])
    assert options.config.optimiser.learning_rate == 0.5
    assert options.config.steps == 7
    assert options.config.objective.model.block_out_channels == (2, 2, 4)


@pytest.mark.parametrize(
    "flags",
    [
        ["--optimiser.learning-rat", "1"],
        ["--optimiser.learning-rate", "fast"],
        ["--optimiser.learning-rate", "-1"],
        ["--objective.model.latent-channels", "0"],
        ["--steps", "0"],
        ["--dtype", "float8"],
    ],
    ids=" ".join,
)
def test_unknown_flags_and_values_end_with_code_2(tmp_path, capsys, flags):
    command = [config_file(tmp_path), "--workdir", str(tmp_path / "w"), *flags]
    try:
        code = main.run("train", command)
    except SystemExit as ended:
        code = ended.code
    assert code == 2
    assert flags[0].lstrip("-").rpartition(".")[2].split("-")[0] in capsys.readouterr().err


@pytest.mark.parametrize(("arguments", "code"), [([], 2), (["--steps", "1"], 2), (["--help"], 0)])
def test_without_a_config_usage_is_shown(capsys, arguments, code):
    with pytest.raises(SystemExit) as ended:
        parse(arguments)
    assert ended.value.code == code
    assert "usage: train.py CONFIG" in capsys.readouterr().err


def test_a_config_may_import_a_module_by_its_former_name(tmp_path):
    text = (
        "from jaxdiff.models.unet_config import UNet2DConditionConfig\n"
        "from jaxdiff.training.config import DiffusionObjective, TrainConfig\n"
        "model = UNet2DConditionConfig(sample_size=8)\n"
        "objective = DiffusionObjective(model=model, vae='vae', text_encoder='text')\n"
        "config = TrainConfig(objective=objective, steps=1, batch_size=1)\n"
    )
    config = load_config(tmp_path / config_file(tmp_path, text))
    assert config.objective.model == UNet2DConditionConfig(sample_size=8)


def test_config_files_that_are_none_are_refused(tmp_path):
    with pytest.raises(InputError, match="nowhere"):
        load_config(tmp_path / "nowhere.py")
    with pytest.raises(InputError, match="expected config = TrainConfig"):
        load_config(tmp_path / config_file(tmp_path, "config = 3"))
