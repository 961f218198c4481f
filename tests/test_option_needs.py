"""Options that have no effect without another one: tables of all of them, and each in them."""

import dataclasses
import pathlib
import re
import typing

import pytest

from jaxdiff.cli import cache_latents, convert, evaluate, export, generate, serve, strip, sweep
from jaxdiff.core.configs import Need, check_needs
from jaxdiff.core.errors import InputError
from jaxdiff.samplers import SAMPLERS
from jaxdiff.training.config import DiffusionObjective, OptimiserConfig, VAEObjective

# Options that have an effect whatever the others are, or of which the command says more than a
# table could: those that a line of a prompt file can give, and those of other parts of a command.
ALONE = {
    generate: "prompt prompts from_image model vae base text_encoders negative_prompt prompt_2 "
    "negative_prompt_2 prompt_3 negative_prompt_3 guidance_scale guidance negative_scale "
    "distilled_guidance_scale classifier_scale clip_scale guidance_model steps sampler "
    "timestep_spacing eta height width image original_image mask strength hires_scale lora "
    "textual_inversion noise_level then refiner clip_skip max_sequence_length vae_tile "
    "prompt_syntax seed num_images batch_size dtype mesh offload output json",
    evaluate: "model then vae base text_encoders guidance_scale guidance classifier_scale steps "
    "sampler timestep_spacing seed batch_size mesh prompt output",
    sweep: "prompt scales guidance samplers steps negative_prompt classifier_scales clip_scales "
    "model vae base text_encoders guidance_model mesh evaluate measure_speed seed output",
    strip: "prompt show_steps model vae base text_encoders negative_prompt guidance guidance_scale "
    "classifier_scale steps sampler timestep_spacing seed output",
    serve: "model vae base text_encoders dtype mesh offload vae_tile host port api_key cors_origin "
    "served_model_name slots max_waiting shutdown_timeout max_pixels max_steps max_images sizes "
    "max_prompt_length max_upload_bytes max_json_bytes max_image_pixels lora_folder max_jobs "
    "job_ttl max_job_bytes log_requests",
    cache_latents: "vae output data texts dtype compute_dtype batch_size shard_size "
    "min_bucket_size process_count",
    convert: "source output format dtype variant prediction_type scaling_factor vae base "
    "text_encoders",
    export: "source output ema dtype guidance_scale steps sampler timestep_spacing "
    "closed_vocabulary",
}


@pytest.mark.parametrize("command", ALONE, ids=lambda module: module.__name__.split(".")[-1])
def test_every_option_is_known_to_need_another_or_none(command):
    fields = {field.name for field in dataclasses.fields(command.Options)}
    needs = getattr(command, "NEEDS", {})
    assert fields == needs.keys() | set(ALONE[command].split())
    assert not needs.keys() & set(ALONE[command].split())
    assert {need.option for need in needs.values()} <= fields


CLI = [(command, name) for command in ALONE for name in getattr(command, "NEEDS", {})]


def some_value(command, name):
    """A value of the option that is not its default."""
    hint = typing.get_type_hints(command.Options)[name]
    if typing.get_origin(hint) is tuple:
        return ("x",)
    kinds = typing.get_args(hint) or (hint,)
    values = {bool: True, int: 2, float: 0.5, str: "x", pathlib.Path: pathlib.Path("x")}
    return next(value for kind, value in values.items() if kind in kinds)


@pytest.mark.parametrize(
    ("command", "name"), CLI, ids=[f"{c.__name__.split('.')[-1]}-{n}" for c, n in CLI]
)
def test_an_option_without_what_it_needs(command, name):
    need = command.NEEDS[name]
    required = {
        field.name: some_value(command, field.name)
        for field in dataclasses.fields(command.Options)
        if field.default is field.default_factory is dataclasses.MISSING
    }
    given = some_value(command, name)
    right, wrong = some_value(command, need.option), None
    if need.values:
        right, wrong = need.values[0], "other"
    with_both = command.Options(**required, **{name: given, need.option: right})
    check_needs(with_both, command.NEEDS)
    default = {f.name: f.default for f in dataclasses.fields(command.Options)}[need.option]
    lacking = dataclasses.replace(with_both, **{need.option: wrong if need.values else default})
    with pytest.raises(InputError, match=f"^{name}: got {re.escape(str(given))} with"):
        check_needs(lacking, command.NEEDS)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Some:
    cap: float = 5.0
    kind: str = "plain"
    file: str | None = None
    part: int = 3


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, None),
        ({"cap": 5.0}, None),
        ({"cap": 4.0}, "a.cap: got 4.0 with a.kind plain, expected a.kind capped or p2"),
        ({"cap": 4.0, "kind": "p2"}, None),
        ({"part": 1}, "a.part: got 1 without a.file, expected both"),
        ({"part": 1, "file": ""}, "a.part: got 1 without a.file, expected both"),
        ({"part": 1, "file": "x"}, None),
    ],
)
def test_needs(values, message):
    needs = {"cap": Need("kind", ("capped", "p2")), "part": Need("file")}
    if message is None:
        check_needs(Some(**values), needs, prefix="a.")
    else:
        with pytest.raises(InputError, match=f"^{message}$"):
            check_needs(Some(**values), needs, prefix="a.")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: VAEObjective(freeze_encoder=True), "objective.freeze_encoder: got True without"),
        (lambda: VAEObjective(latent_noise=0.1), "objective.latent_noise: got 0.1 without"),
        (lambda: VAEObjective(perceptual_weight=2.0), "objective.perceptual_weight: got 2.0 wit"),
        (lambda: VAEObjective(adversarial_start=9), "objective.adversarial_start: got 9 without"),
        (
            lambda: DiffusionObjective(pipeline="p", snr_gamma=4.0),
            "objective.snr_gamma: got 4.0 with objective.weighting uniform",
        ),
        (
            lambda: DiffusionObjective(pipeline="p", prior_loss_weight=2.0),
            "objective.prior_loss_weight: got 2.0 without objective.prior_data",
        ),
        (
            lambda: OptimiserConfig(decay_fraction=0, min_lr_ratio=0.1),
            "optimiser.min_lr_ratio: got 0.1 without optimiser.decay_fraction",
        ),
        (lambda: OptimiserConfig(momentum=0.5), "optimiser.momentum: got 0.5 with optimiser.name"),
        (lambda: dataclasses.replace(SAMPLERS["heun"], s_tmin=0.1), "s_tmin: got 0.1 without"),
        (
            lambda: dataclasses.replace(SAMPLERS["euler"], s_churn=1.0, s_tmin=2.0, s_tmax=1.0),
            "s_tmax: got 1.0, expected a number from 2.0",
        ),
    ],
)
def test_fields_of_configs_and_samplers(make, message):
    with pytest.raises(InputError, match=f"^{message}"):
        make()
