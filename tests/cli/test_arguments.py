"""Options of commands: one sentence for those that they do not have, help with what they do."""

import dataclasses
import re

import pytest

from jaxdiff.cli import main
from jaxdiff.cli.generate import Options
from jaxdiff.core.names_elsewhere import CHOICES, OPTIONS, SPACINGS, did_you_mean
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
            "--prompt: got an unknown option, expected its value without it",
        ),
        (["generate", "a", "--steps", "2", "b"], "b: got an argument too many, expected an option"),
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
    assert set(OPTIONS.values()) <= {field.name for field in dataclasses.fields(Options)}
    known = {*SAMPLERS, *TIMESTEP_SPACINGS, *SIGMA_SCHEDULES, *PREDICTION_TYPES}
    known |= {"float32", "bfloat16", "float16"}
    assert {*CHOICES.values(), *SPACINGS.values()} <= known
    assert all(name.isalnum() and name.islower() for name in (*OPTIONS, *CHOICES))


@pytest.mark.parametrize(
    ("option", "nearest"),
    {
        "--scale": "guidance-scale",
        "--plms": "sampler",
        "--upscale": "hires-scale",
        "--fp16": "dtype",
        "--stepps": "steps",
        "--help-all": "",
        "--version": "",
        "--device": "",
        "--turbo": "",
        "--silent": "",
        "--ar": "",
    }.items(),
)
def test_the_nearest_option_is_near(option, nearest):
    names = [f"--{field.name.replace('_', '-')}" for field in dataclasses.fields(Options)]
    expected = f" (did you mean '--{nearest}'?)" if nearest else ""
    assert did_you_mean(option, names) == expected


@pytest.mark.parametrize(
    ("text", "choices", "hint"),
    [
        ("DPM++ 2M Karras", SAMPLERS, "'dpmpp-2m' with timestep_spacing 'karras'"),
        ("DPM++ 2M SDE", SAMPLERS, "'dpmpp-2m-sde'"),
        ("Euler a", SAMPLERS, "'euler-ancestral'"),
        ("k_euler_ancestral", SAMPLERS, "'euler-ancestral'"),
        ("dpmpp_2m", SAMPLERS, "'dpmpp-2m'"),
        ("DPMSolverMultistepScheduler", SAMPLERS, "'dpmpp-2m'"),
        ("DPM++ 2M SGM Uniform", SAMPLERS, "'dpmpp-2m' with timestep_spacing 'trailing'"),
        ("KDPM2AncestralDiscreteScheduler", SAMPLERS, "'kdpm2-ancestral'"),
        ("normal", TIMESTEP_SPACINGS, "'linspace'"),
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


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["generate", "a", "--steps", "10.5"], "--steps: got '10.5', expected an integer"),
        (["generate", "a", "--seed", "abc"], "--seed: got 'abc', expected an integer"),
        (["generate", "a", "-n", "two"], "--num-images: got 'two', expected an integer"),
        (["generate", "a", "--strength", "x"], "--strength: got 'x', expected a number"),
        (
            ["generate", "a", "--negative-prompt", "-ugly"],
            "--negative-prompt: got no value, expected one; one that begins with a hyphen as "
            "--negative-prompt=VALUE",
        ),
        (["convert", "a"], "got an argument too few, expected PATH The folder to write"),
        (
            ["train", CONFIG, "--workdir", "w", "--steps", "x"],
            "--steps: got 'x', expected an integer",
        ),
        (
            ["train", CONFIG, "--workdir", "w", "--data.kind", "x"],
            "data.kind: got 'x', expected one of",
        ),
        (["train", CONFIG], "got an argument too few, expected workdir PATH"),
    ],
)
def test_a_value_that_does_not_fit_is_one_sentence(capsys, command, said):
    assert main.run(command[0], command[1:]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith(f"{command[0]}: {said}")
    assert (printed.err.count("\n"), printed.out) == (1, "")
