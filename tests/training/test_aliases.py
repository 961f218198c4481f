"""Old spellings of config fields and options still work, and old workdirs resume.

`old_configs/` has config.json files as the code before the renaming wrote them.
"""

import dataclasses
import functools
import json
import pathlib
import shutil

import pytest

from jaxdiff.cli import main
from jaxdiff.cli.train import parse
from jaxdiff.core.aliases import rename_options
from jaxdiff.core.errors import InputError
from jaxdiff.experiments.loggers import JsonlLog, read_lines
from jaxdiff.experiments.workdir import check_identity, read_config
from jaxdiff.training.config import (
    ClassifierObjective,
    CLIPObjective,
    DataConfig,
    DiffusionObjective,
    DistillationObjective,
    EMAConfig,
    LoRA,
    OptimiserConfig,
    TextualInversion,
    TrainConfig,
    VAEObjective,
    aliases,
    resume_identity,
)

OLD = pathlib.Path(__file__).parent / "old_configs"
SIZE = {"steps": 10, "batch_size": 8}
IMAGES = {"kind": "folder", "path": "images"}
CONFIGS = {
    "vae": TrainConfig(
        objective=VAEObjective(
            weights="vae",
            freeze_encoder=True,
            kl_weight=0.0,
            perceptual_model="clip",
            adversarial_weight=0.5,
        ),
        data=DataConfig(
            **IMAGES,
            resolution=128,
            max_aspect_ratio=2.0,
            bucket_multiple=32,
            max_bad_fraction=0.1,
            validation_size=32,
            cache_dir="cache",
        ),
        optimiser=OptimiserConfig(
            lr_multipliers=(("^decoder", 0.0), ("up_blocks", 0.5)), min_lr_ratio=0.1
        ),
        ema=EMAConfig(power_stds=(0.05, 0.1), snapshot_every=100),
        gradient_accumulation_steps=2,
        max_checkpoints=3,
        max_nonfinite_steps=4,
        **SIZE,
    ),
    "clip": TrainConfig(
        objective=CLIPObjective(attribute_weight=0.5), data=DataConfig(variations=4), **SIZE
    ),
    "lora": TrainConfig(
        objective=DiffusionObjective(
            pipeline="model",
            trainable=LoRA(rank=2, target_modules=("to_q",), text_target_modules=("q_proj",)),
            snr_gamma=3.0,
            weighting="min_snr",
            timestep_sampling="logit_normal",
            timestep_shift=2.0,
            caption_dropout_per_encoder=(0.1, 0.2),
            prior_data=DataConfig(kind="folder", path="dogs", resolution=64, validation_size=2),
            prior_loss_weight=0.5,
            sample_guidance_scale=3.0,
            num_eval_images=8,
            eval_clip="clip",
        ),
        data=DataConfig(**IMAGES, resolution=64, validation_size=1),
        **SIZE,
    ),
    "word": TrainConfig(
        objective=DiffusionObjective(
            pipeline="model",
            trainable=TextualInversion(
                placeholder_token="<x>", initializer_token="toy", num_vectors=2
            ),
        ),
        data=DataConfig(**IMAGES, resolution=64),
        **SIZE,
    ),
    "unet": TrainConfig(objective=DiffusionObjective(vae="vae", text_encoder="clip"), **SIZE),
    "distilled": TrainConfig(
        objective=DistillationObjective(
            teacher="model",
            guidance_embedding_dim=32,
            guidance_scale_range=(1.0, 8.0),
            sample_guidance_scale=2.0,
        ),
        **SIZE,
    ),
    "classifier": TrainConfig(
        objective=ClassifierObjective(
            vae="vae",
            timestep_sampling="logit_normal",
            timestep_shift=2.0,
            noise_levels_per_image=3,
        ),
        **SIZE,
    ),
}
SCRIPT = """
from jaxdiff.training.config import *
config = TrainConfig(objective=VAEObjective(), steps=3, batch_size=8)
"""


def changed(config, section, **fields):
    """`config` with other values of the fields of a section."""
    inner = dataclasses.replace(getattr(config, section), **fields)
    return dataclasses.replace(config, **{section: inner})


# Changes that no workdir may resume with, and the field that the error names.
CHANGES = {
    "vae": [
        (changed(CONFIGS["vae"], "ema", power_stds=(0.05, 0.2)), "ema.power_stds"),
        (changed(CONFIGS["vae"], "optimiser", lr_multipliers=()), "optimiser.lr_multipliers with"),
        (changed(CONFIGS["vae"], "objective", freeze_encoder=False), "objective.freeze_encoder"),
    ],
    "clip": [
        (
            changed(CONFIGS["clip"], "objective", attribute_weight=0.0),
            "objective.has_attribute_heads",
        )
    ],
    "lora": [
        (
            changed(CONFIGS["lora"], "objective", trainable=LoRA(rank=3)),
            "objective.trainable.rank",
        ),
        (
            changed(CONFIGS["lora"], "objective", trainable=LoRA(rank=2)),
            "objective.trainable.target_modules",
        ),
        (
            changed(CONFIGS["lora"], "objective", trainable=CONFIGS["word"].objective.trainable),
            "objective.trainable",
        ),
    ],
    "word": [
        (
            changed(
                CONFIGS["word"],
                "objective",
                trainable=TextualInversion(
                    placeholder_token="<y>", initializer_token="toy", num_vectors=2
                ),
            ),
            "objective.trainable.placeholder_token",
        )
    ],
    "distilled": [
        (
            changed(CONFIGS["distilled"], "objective", guidance_embedding_dim=64),
            "objective.guidance_embedding_dim",
        )
    ],
}


@pytest.fixture
def workdir(tmp_path):
    """A function that makes a workdir with an old config.json and a checkpoint."""

    def make(name):
        (tmp_path / "checkpoints" / "3").mkdir(parents=True)
        shutil.copy(OLD / f"{name}.json", tmp_path / "config.json")
        return tmp_path

    return make


# Fields that came later, whose defaults are what those trainings did.
ADDED = {"objective.model.learned_variance", "objective.enlargement"}


@pytest.mark.parametrize("name", CONFIGS)
def test_an_old_workdir_is_read_and_resumes(workdir, name):
    folder = workdir(name)
    assert read_config(folder) == CONFIGS[name]
    now = resume_identity(CONFIGS[name])
    stored = json.loads((folder / "config.json").read_text())["identity"]
    assert {aliases.new_path(key) for key in stored} == now.keys() - ADDED
    check_identity(now, folder)


@pytest.mark.parametrize("name", CHANGES)
def test_an_old_workdir_refuses_another_model(workdir, name):
    folder = workdir(name)
    for config, field in CHANGES[name]:
        with pytest.raises(InputError, match=f"(^|; ){field}[^:]*: got .* as trained so far"):
            check_identity(resume_identity(config), folder)


def test_every_old_field_is_in_an_old_config():
    stored = [json.loads(path.read_text()) for path in OLD.glob("*.json")]
    found = set()
    for config in stored:
        trainable = config["objective"].get("train", {})
        for section, values in (
            ("", config),
            *((name, config[name]) for name in ("data", "ema", "optimiser", "objective")),
            ("objective.trainable", trainable),
        ):
            found |= {(section, name) for name in values}
        found |= {tuple(key.rsplit(".", 1)) for key in config["identity"] if "." in key}
    table = {(section, old) for section, names in aliases.FIELDS.items() for old in names}
    assert table <= found


def test_a_config_in_both_spellings_is_refused(workdir):
    folder = workdir("unet")
    values = json.loads((folder / "config.json").read_text())
    values["data"]["max_aspect_ratio"] = 1.0
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.raises(InputError, match=r"config\.json: max_aspect_ratio: got widest too"):
        read_config(folder)


def test_python_configs_take_old_fields():
    data = DataConfig(**IMAGES, resolution=64, widest=2.0, cell=32)
    assert data == DataConfig(**IMAGES, resolution=64, max_aspect_ratio=2.0, bucket_multiple=32)
    assert LoRA(targets=("a",)) == LoRA(target_modules=("a",))
    config = TrainConfig(objective=VAEObjective(), accumulate=2, **SIZE)
    assert config.gradient_accumulation_steps == 2
    assert dataclasses.replace(config, accumulate=4).gradient_accumulation_steps == 4
    assert dataclasses.replace(data, cell=16).bucket_multiple == 16
    with pytest.raises(
        InputError, match=r"^max_aspect_ratio: got widest too, two names of one thing"
    ):
        DataConfig(**IMAGES, resolution=64, widest=2.0, max_aspect_ratio=2.0)
    with pytest.raises(TypeError, match="unexpected keyword argument 'accumulat'"):
        TrainConfig(objective=VAEObjective(), accumulat=2, **SIZE)


@pytest.mark.parametrize(
    ("flags", "value"),
    [
        (["--data.held-out", "9"], lambda c: c.data.validation_size == 9),
        (["--data.held_out=9"], lambda c: c.data.validation_size == 9),
        (["--accumulate", "2"], lambda c: c.gradient_accumulation_steps == 2),
        (
            ["--optimiser.groups", "a", "0", "b", "0.5"],
            lambda c: c.optimiser.lr_multipliers == (("a", 0.0), ("b", 0.5)),
        ),
        (["--objective.only-decoder"], lambda c: c.objective.freeze_encoder),
        (["--objective.no-only-decoder"], lambda c: not c.objective.freeze_encoder),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_old_options_are_accepted(tmp_path, flags, value):
    script = SCRIPT.replace("VAEObjective()", 'VAEObjective(weights="vae", kl_weight=0.0)')
    (tmp_path / "config.py").write_text(
        script.replace("steps", 'data=DataConfig(kind="folder", path="a", resolution=64), steps')
    )
    if "--objective.no-only-decoder" in flags or "--objective.only-decoder" in flags:
        flags = [*flags, "--objective.kl-weight", "0.0001"]
    assert value(parse([str(tmp_path / "config.py"), "--workdir", "w", *flags]).config)


def test_old_options_are_hidden_and_exclude_the_new(tmp_path, capsys):
    (tmp_path / "config.py").write_text(SCRIPT)
    command = [str(tmp_path / "config.py"), "--workdir", str(tmp_path / "w")]
    with pytest.raises(SystemExit):
        parse([command[0], "--help"])
    shown = capsys.readouterr().out
    assert "--gradient-accumulation-steps" in shown
    assert "--accumulate" not in shown
    both = ["--accumulate", "2", "--gradient-accumulation-steps", "2"]
    for flags in (both, [*both[2:], *both[:2]]):
        assert main.run("train", [*command, *flags]) == 2
        said = capsys.readouterr().err
        assert "--accumulate" in said
        assert "two names of one option, expected --gradient-accumulation-steps alone" in said
    assert main.run("cache-latents", ["a", "b", "--items", "3", "--num-scenes", "3"]) == 2
    assert "num-scenes: got --items and --num-scenes, two names" in capsys.readouterr().err


def test_options_of_cache_latents_have_no_prefix():
    flags = [
        "model",
        "out",
        "--kind",
        "folder",
        "--widest",
        "2",
        "--cache=c",
        "--texts",
        "captions",
    ]
    rename = functools.partial(aliases.new_option, section="data")
    assert rename_options(flags, rename) == [
        *flags[:4],
        "--max-aspect-ratio",
        "2",
        "--cache-dir=c",
        *flags[7:],
    ]


def test_an_old_log_goes_on_under_the_new_keys(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1, "loss": 2.0, "skipped": 1.0}\n{"step": 2, "skipped": 0.0}\n')
    assert read_lines(path)[0] == {"step": 1, "loss": 2.0, "nonfinite_steps": 1.0}
    JsonlLog(path, step=1)(2, {"nonfinite_steps": 3.0})
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines == [
        {"step": 1, "loss": 2.0, "nonfinite_steps": 1.0},
        {"step": 2, "nonfinite_steps": 3.0},
    ]
