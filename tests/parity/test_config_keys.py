"""The table of config keys has every argument of the classes of diffusers and transformers."""

import dataclasses
import inspect

import diffusers
import pytest
import transformers
from diffusers.pipelines.deprecated.unclip.text_proj import UnCLIPTextProjModel
from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import (
    StableUnCLIPImageNormalizer,
)

from jaxdiff.checkpoints.config_keys import (
    DIFFUSERS_NO_EFFECT,
    SCHEDULER_KEYS,
    TRANSFORMERS_NO_EFFECT,
    component_keys,
    names,
)
from jaxdiff.checkpoints.configs import ABSENT
from jaxdiff.checkpoints.model_registry import MODEL_CLASSES
from jaxdiff.checkpoints.schedulers import (
    CLIPS_BY_DEFAULT,
    SCHEDULERS,
    SchedulerOptions,
    sampler_name,
    schedule_of,
)
from jaxdiff.checkpoints.timestep_grids import convention_of
from jaxdiff.models.clip_config import CLIPTextConfig, CLIPVisionConfig

FORMER = ("Transformer2DModel",)  # whose defaults are those of other models
OURS = ("LatentClassifier", "ClassConditionalUNet2DModel")  # which diffusers does not have
OF_PIPELINES = {
    "UnCLIPTextProjModel": UnCLIPTextProjModel,
    "StableUnCLIPImageNormalizer": StableUnCLIPImageNormalizer,
}


def defaults(config):
    """The defaults of a config's fields that have one."""
    fields = dataclasses.fields(config)
    return {f.name: f.default for f in fields if f.default is not dataclasses.MISSING}


def arguments(cls):
    parameters = inspect.signature(cls.__init__).parameters.values()
    return {p.name: p.default for p in parameters if p.name != "self"}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers(name):
    """Their arguments are in the table, and a config that lacks them means their defaults."""
    config = arguments(getattr(diffusers, name))
    assert config.keys() <= SCHEDULER_KEYS.keys()
    named = {"_class_name": name}
    assert schedule_of(named) == schedule_of(config | named)
    assert sampler_name(named) == sampler_name(config | named)
    if name != "TCDScheduler":  # which does not read it
        assert config.get("clip_sample") == CLIPS_BY_DEFAULT.get(name)
    convention, options = convention_of(sampler_name(named)), SchedulerOptions.from_config(named)
    if not convention.fixed_spacing and "timestep_spacing" in config:
        assert convention.spacing == config["timestep_spacing"]
    if convention.final_sigma == "set_alpha_to_one":
        assert convention.set_alpha_to_one_default == config["set_alpha_to_one"]
    for key, default in config.items():
        if key in SchedulerOptions.__dataclass_fields__ and key not in (
            "timestep_spacing",
            "set_alpha_to_one",
            "sigma_schedule",
        ):
            assert getattr(options, key) == default


@pytest.mark.parametrize(
    "kind", [k for k in MODEL_CLASSES.values() if k.library == "diffusers" and k.name not in OURS]
)
def test_networks_of_diffusers(kind):
    cls = OF_PIPELINES.get(kind.name) or getattr(diffusers, kind.name)
    config = kind.config
    known = component_keys(config).keys() | names(DIFFUSERS_NO_EFFECT)
    assert arguments(cls).keys() <= known | getattr(config, "ABSENT", {}).keys()
    for key, default in arguments(cls).items():
        assert kind.name in FORMER or defaults(config).get(key, inspect.Parameter.empty) == default


@pytest.mark.parametrize(
    ("cls", "config"),
    [
        (transformers.CLIPTextConfig, CLIPTextConfig),
        (transformers.CLIPVisionConfig, CLIPVisionConfig),
    ],
)
def test_networks_of_transformers(cls, config):
    known = component_keys(config).keys() | names(TRANSFORMERS_NO_EFFECT) | ABSENT.keys()
    assert arguments(cls).keys() <= known
    assert {key for key in cls().to_dict() if not key.startswith("_")} <= known
    for key in component_keys(config):
        assert getattr(config(), key) == getattr(cls(), key)
