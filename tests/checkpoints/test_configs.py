"""config.json files of real repositories, and what is not taken for one."""

import json
import pathlib

import pytest

from jaxdiff.checkpoints.configs import from_transformers, updated
from jaxdiff.checkpoints.model_registry import MODEL_CLASSES, class_name_of
from jaxdiff.core.errors import InputError
from jaxdiff.core.trees import parameter_count
from jaxdiff.models.build import abstract, param_dict
from jaxdiff.models.clip_config import CLIPTextConfig

REAL = json.loads((pathlib.Path(__file__).parent / "repository_configs.json").read_text())
# Parameters of the networks, as reference implementations count them.
COUNTS = {
    "sd15/unet": 859_520_964,
    "sd15/vae": 83_653_863,
    "sd15/text_encoder": 123_060_480,
    "sd15-inpainting/unet": 859_535_364,
    "sd21/unet": 865_910_724,
    "sd21-base/text_encoder": 340_387_840,
    "sdxl-base/unet": 2_567_463_684,
    "sdxl-base/text_encoder_2": 694_659_840,
    "sdxl-refiner/unet": 2_259_526_660,
    "sd3-medium/vae": 83_819_683,
    "sd3-medium/text_encoder": 123_650_304,
}


@pytest.mark.parametrize("name", REAL)
def test_real_configs_are_read(name):
    raw = REAL[name]
    cls = raw.get("_class_name") or raw["architectures"][0]
    kind = MODEL_CLASSES[cls.removeprefix("Flax")]
    module = abstract(kind.module, *kind.configs(raw, source=name), **kind.options)
    assert class_name_of(module) == kind.name
    if name in COUNTS:
        assert parameter_count(param_dict(module)) == COUNTS[name]


def test_counted_configs_are_all_there():
    assert COUNTS.keys() <= REAL.keys()


TOWER = {"hidden_size": 8, "num_attention_heads": 2, "top_k": 50, "add_cross_attention": False}
CLIP = {
    "architectures": ["CLIPModel"],
    "initializer_factor": 1.0,
    "logit_scale_init_value": 2.6592,
    "model_type": "clip",
    "projection_dim": 6,
    "text_config": TOWER | {"bad_words_ids": None, "id2label": {"0": "LABEL_0"}},
    "text_config_dict": {"hidden_size": 16},
    "vision_config": TOWER,
    "vision_config_dict": None,
}


def test_config_of_both_towers():
    text, vision, width = MODEL_CLASSES["CLIPModel"].configs(CLIP, source="config.json")
    assert (text.hidden_size, vision.hidden_size, width) == (16, 8, 6)
    broken = CLIP | {"text_config": TOWER | {"rotary": True}}
    with pytest.raises(InputError, match=r"config\.json: text_config: field: got 'rotary'"):
        MODEL_CLASSES["CLIPModel"].configs(broken, source="config.json")


@pytest.mark.parametrize("value", [True, [], {}, None, "7", 1.5])
def test_values_of_the_wrong_type(value):
    with pytest.raises(InputError, match=r"c\.json: vocab_size: got .*, expected an integer"):
        from_transformers(CLIPTextConfig, {"vocab_size": value}, source="c.json")


def test_lists_of_the_wrong_type():
    raw = {"block_out_channels": [8, "16"]}
    with pytest.raises(InputError, match="expected a list, each an integer"):
        MODEL_CLASSES["AutoencoderKL"].configs(raw, source="c.json")
    with pytest.raises(InputError, match="expected an integer or a list, each an integer"):
        MODEL_CLASSES["UNet2DConditionModel"].configs(
            {"attention_head_dim": [[5]]}, source="c.json"
        )


def test_updating_keeps_what_was_left_out():
    raw = {"a": 1, "foreign": "x", "inner": {"b": 2, "note": 0}}
    before = {"a": 1, "default": 3, "inner": {"b": 2}}
    now = {"a": 1, "default": 3, "inner": {"b": 5}}
    assert updated(raw, now, before) == raw | {"inner": {"b": 5, "note": 0}}
    assert updated({}, now, {}) == now
