"""Former names: each leads to a name of today, and both together are an error."""

import dataclasses
import importlib
import inspect

import pytest

import jaxdiff
from jaxdiff.cli import train
from jaxdiff.core.aliases import (
    ACCURACIES,
    ARGUMENTS,
    GUIDANCE,
    GUIDANCE_OPTIONS,
    OPTIONS,
    SETTINGS,
    WEB_UI_SAMPLERS,
    former_options,
    rename_arguments,
    rename_guidance,
    rename_keys,
    rename_options,
    rename_sampler,
    rename_settings,
)
from jaxdiff.core.errors import InputError
from jaxdiff.guidance.base import RULES, WRAPPERS, parse
from jaxdiff.pipeline.cascade import hires_fix
from jaxdiff.pipeline.options import Options
from jaxdiff.pipeline.pipeline import Pipeline
from jaxdiff.planning.sampled_model import SamplingOptions
from jaxdiff.samplers.base import get_sampler


def fields(command):
    """The options of a command, with - for _."""
    module = importlib.import_module(f"jaxdiff.cli.{command.replace('-', '_')}")
    names = {field.name for field in dataclasses.fields(module.Options)}
    if command == "generate":
        names |= {field.name for field in dataclasses.fields(SamplingOptions)}
    return {name.replace("_", "-") for name in names}


@pytest.mark.parametrize("command", sorted(OPTIONS.keys() - {"train"}))
def test_each_former_option_leads_to_an_option(command):
    known = fields(command)
    for former, name in OPTIONS[command].items():
        assert name.removeprefix("no-") in known
        assert former not in known


def test_former_options_of_train(capsys):
    for plan, name in ((train.parse, "--ema-std"), (train.plan, "--find-max-batch")):
        with pytest.raises(SystemExit):
            plan(["configs/scenes_vae.py", "--help"])
        shown = capsys.readouterr().out
        assert name in shown
        assert "--ema-width" not in shown
        assert "--largest" not in shown
    assert set(OPTIONS["train"].values()) == {"ema-std", "find-max-batch"}


def test_options_are_renamed_in_every_spelling():
    generate = former_options("generate")
    typed = ["a", "--guide", "m", "--embedding=e", "--literal", "--no-literal", "--timesteps", "x"]
    assert rename_options(typed, generate) == [
        *("a", "--guidance-model", "m", "--textual-inversion=e", "--no-prompt-syntax"),
        *("--prompt-syntax", "--timestep-spacing", "x"),
    ]
    sweep = former_options("sweep")
    assert rename_options(["--no_timed", "--measured"], sweep) == [
        "--no-measure-speed",
        "--evaluate",
    ]
    same = ["--model", "guide", "--seed=3", "-n", "2", "--embedding-size", "--no-json"]
    assert rename_options(same, generate) == same


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        (
            "generate",
            "--guide a --guidance-model b",
            "guidance-model: got --guide and --guidance-m",
        ),
        ("generate", "--guidance_model=b --guide=a", "got --guidance-model and --guide, two names"),
        ("generate", "--literal --prompt-syntax", "prompt-syntax: got --literal and --prompt-synt"),
        (
            "sweep",
            "--no-timed --measure-speed",
            "measure-speed: got --no-timed and --measure-speed",
        ),
    ],
)
def test_both_names_of_an_option_are_an_error(command, arguments, message):
    with pytest.raises(InputError, match=message):
        rename_options(arguments.split(), former_options(command))


def test_each_former_argument_leads_to_an_argument():
    functions = (Pipeline.__call__, Pipeline.load_textual_inversion, hires_fix, jaxdiff.load)
    known = {name for f in functions for name in inspect.signature(f).parameters}
    known |= Options.__annotations__.keys()
    assert set(ARGUMENTS.values()) <= known
    assert not ARGUMENTS.keys() & known


def test_arguments_are_renamed():
    call = rename_arguments(lambda *args, **kwargs: (args, kwargs))
    assert call(1, watch=[2], steps=3) == ((1,), {"intermediate_steps": [2], "steps": 3})
    with pytest.raises(InputError, match=r"^callback: got report too, two names of one thing"):
        call(report=print, callback=print)


def test_each_former_rule_leads_to_a_rule():
    assert set(GUIDANCE.values()) <= RULES.keys() | WRAPPERS.keys()
    assert not GUIDANCE.keys() & (RULES.keys() | WRAPPERS.keys())
    for rule, names in GUIDANCE_OPTIONS.items():
        known = {field.name for field in dataclasses.fields(RULES[rule])}
        assert set(names.values()) <= known
        assert not names.keys() & known


@pytest.mark.parametrize(
    ("former", "text"),
    [
        ("three:perpendicular=true", "negative:perpendicular=true"),
        ("auto", "autoguidance"),
        (
            "cfg-zero:zero_steps=2 + clip:limit=6",
            "cfg-zero-star:zero_steps=2 + clip-sample:limit=6",
        ),
        ("apg: radius=15, momentum=-0.5+rescale", "apg: norm_threshold=15, momentum=-0.5+rescale"),
        ("pag:k=2", "pag:scale=2"),
    ],
)
def test_rules_are_renamed(former, text):
    assert rename_guidance(former) == text
    assert rename_guidance(text) == text
    assert parse(former) == parse(text)


def test_both_names_of_an_option_of_a_rule_are_an_error():
    with pytest.raises(InputError, match="guidance: pag: got k and scale, two names"):
        parse("pag:k=2,scale=3")


def test_stored_settings_are_renamed():
    stored = {"guide": "a 1", "guidance": "auto+clip", "timesteps": None, "seed": 3}
    assert rename_settings(stored, source="a.png") == {
        "guidance_model": "a 1",
        "guidance": "autoguidance+clip-sample",
        "timestep_spacing": None,
        "seed": 3,
    }
    with pytest.raises(InputError, match=r"^a\.png: guidance_model: got guide too"):
        rename_settings({"guide": "a", "guidance_model": "b"}, source="a.png")


@pytest.mark.parametrize("names", [ARGUMENTS, SETTINGS, GUIDANCE, ACCURACIES, *OPTIONS.values()])
def test_no_name_of_today_is_a_former_one(names):
    assert not names.keys() & set(names.values())
    assert rename_keys(dict.fromkeys(names.values()), names) == dict.fromkeys(names.values())


def test_samplers_have_the_names_of_the_web_ui():
    for word, name in WEB_UI_SAMPLERS.items():
        assert get_sampler(word) == get_sampler(name) == get_sampler(word.lower())
    assert rename_sampler("Heun:churn=3") == "heun:s_churn=3"
