"""Options of commands: one sentence for those that they do not have, help with what they do."""

import dataclasses
import re

import pytest

from jaxdiff.cli import main
from jaxdiff.cli.generate import Options
from jaxdiff.core.names_elsewhere import NAMES, SPACINGS, did_you_mean
from jaxdiff.diffusion.denoising import PREDICTION_TYPES
from jaxdiff.diffusion.grids import SIGMA_SCHEDULES, TIMESTEP_SPACINGS
from jaxdiff.guidance.base import RULES, WRAPPERS
from jaxdiff.samplers import SAMPLERS

CONFIG = "configs/scenes_vae.py"


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["generate", "a", "--cfg-scale", "7"], "--cfg-scale: .* .did you mean '--guidance-scale'"),
        (["generate", "a", "--scheduler=euler"], "--scheduler: .* .did you mean '--sampler'"),
        (["generate", "a", "--no-jason"], "--no-jason: .* .did you mean '--json'"),
        (
            ["generate", "--prompt", "a"],
            "--prompt: got an unknown option, expected its value alone",
        ),
        (["generate", "a", "--steps", "2", "b"], "b: got an unknown argument, expected one of"),
        (["sweep", "--scale", "2"], "--scale: .* .did you mean '--scales'"),
        (["convert", "a", "b", "--form", "c"], "--form: .* .did you mean '--format'"),
        (["evaluate", "--sampling-method", "a"], "--sampling-method: .*mean '--sampler'"),
        (["train", CONFIG, "--workdir", "w", "--lr", "1"], "--lr: got an unknown option"),
        (
            ["train", CONFIG, "--workdir", "w", "--optimizer.learning-rate", "1"],
            "--optimizer.learning-rate: .*did you mean '--optimiser.learning-rate'",
        ),
        (["train", CONFIG, "--plan=v5e:2x4", "--stps", "1"], "--stps: .*did you mean '--steps'"),
    ],
)
def test_an_unknown_option_is_one_sentence_with_the_nearest_name(capsys, command, said):
    assert main.run(command[0], command[1:]) == 2
    printed = capsys.readouterr()
    assert re.match(f"{command[0]}: {said}", printed.err)
    assert (printed.err.count("\n"), printed.out) == (1, "")


def test_names_of_other_programs_lead_to_names_of_ours():
    known = {field.name for field in dataclasses.fields(Options)} | {"vae"}
    known |= {*SAMPLERS, *TIMESTEP_SPACINGS, *SIGMA_SCHEDULES, *PREDICTION_TYPES}
    known |= {"float32", "bfloat16", "float16"}
    assert {*NAMES.values(), *SPACINGS.values()} <= known


@pytest.mark.parametrize(
    ("text", "choices", "hint"),
    [
        ("DPM++ 2M Karras", SAMPLERS, "'dpmpp-2m' with timestep_spacing 'karras'"),
        ("DPM++ 2M SDE", SAMPLERS, "'dpmpp-2m-sde'"),
        ("Euler a", SAMPLERS, "'euler-ancestral'"),
        ("k_euler_ancestral", SAMPLERS, "'euler-ancestral'"),
        ("dpmpp_2m", SAMPLERS, "'dpmpp-2m'"),
        ("DPMSolverMultistepScheduler", SAMPLERS, "'dpmpp-2m'"),
        ("SGM Uniform", TIMESTEP_SPACINGS, "'trailing'"),
        ("CFG++", RULES, "'cfg-pp'"),
        ("fp16", ("float32", "float16"), "'float16'"),
        ("v", PREDICTION_TYPES, "'v_prediction'"),
        ("dpmp-2m", SAMPLERS, "'dpmpp-2m'"),
    ],
)
def test_the_nearest_name_of_a_choice(text, choices, hint):
    assert did_you_mean(text, choices) == f" (did you mean {hint}?)"


@pytest.mark.parametrize("text", ["", "+", "nothing like it"])
def test_no_name_is_near(text):
    assert did_you_mean(text, SAMPLERS) == ""


def test_help_shows_the_defaults_of_the_model_and_every_choice(capsys):
    with pytest.raises(SystemExit, match="0"):
        main.run("generate", ["--help"])
    text = capsys.readouterr().out
    assert "None" not in text
    options = " ".join(re.sub("[│╭╰─╮╯]", " ", text).split())
    for option, default in {"steps": "25", "sampler": "dpmpp-2m", "guidance-scale": "3.0"}.items():
        assert re.search(rf"--{option} [A-Z]+ [^()]*\(default: {default}\)", options), option
    for name in (*SAMPLERS, *RULES, *WRAPPERS):
        assert re.search(rf"^  {name} +\w", text, re.M), name


@pytest.mark.parametrize("command", ["sweep", "convert", "export", "strip"])
def test_help_of_other_commands_shows_no_none(capsys, command):
    with pytest.raises(SystemExit, match="0"):
        main.run(command, ["--help"])
    assert "default: None" not in capsys.readouterr().out
