"""What tells that images were made by another model: every byte that they depend on."""

import dataclasses

import jax.numpy as jnp
import pytest
import tiny

import jaxdiff
from jaxdiff.checkpoints.components import Component
from jaxdiff.checkpoints.jsonfiles import read_object, write_object
from jaxdiff.core.trees import content_digest
from jaxdiff.models.build import abstract, param_dict, replace_weights, with_params
from jaxdiff.models.prompt_labels import PROMPT_LABELS
from jaxdiff.models.vae import AutoencoderKL
from jaxdiff.pipeline.pipeline import Pipeline

PROMPT = "a small red circle"


def changed(module):
    """The first weight of `module` with one number that differs in its last bit."""
    path, array = min(param_dict(module).items())
    flat = array.reshape(-1)
    return {path: flat.at[-1].set(jnp.nextafter(flat[-1], jnp.inf)).reshape(array.shape)}


def test_a_digest_is_of_content_and_names_not_of_order():
    a, b = jnp.zeros((2, 3)), jnp.ones(4, jnp.bfloat16)
    want = content_digest({"a": a, "b": b})
    assert len(want) == 64
    assert content_digest({"b": b, "a": a}) == want
    others = [
        {"a": b, "b": a},
        {"a": a.reshape(3, 2), "b": b},
        {"a": a, "b": b.astype(jnp.float16)},
        {"a": a.at[1, 2].set(-0.0), "b": b},
        {"a": a},
    ]
    assert len({want, *map(content_digest, others)}) == 6


@pytest.mark.parametrize("component", ["unet", "vae", "text_encoder"])
def test_one_bit_of_any_network_counts(one_device, component):
    before = one_device.fingerprint
    module = getattr(one_device, component)
    weights = changed(module)
    original = {path: param_dict(module)[path] for path in weights}
    replace_weights(module, weights)
    assert one_device.fingerprint != before
    replace_weights(module, original)
    assert one_device.fingerprint == before


def test_devices_do_not_count_but_scheduler_tokenizer_and_configs_do(pipe, one_device):
    assert pipe.fingerprint == one_device.fingerprint
    parts = one_device.parts
    schedule = dict(parts.scheduler) | {"beta_end": 0.02}
    files = parts.tokenizers["tokenizer"]
    more = dataclasses.replace(files, files=files.files | {"special_tokens_map.json": b"{}"})
    vae = dataclasses.replace(one_device.vae.config, scaling_factor=0.71)
    module = with_params(abstract(AutoencoderKL, vae), param_dict(one_device.vae))
    scaled = parts.components | {"vae": Component(module=module)}
    for own in (
        {"scheduler": schedule},
        {"tokenizers": {"tokenizer": more}},
        {"components": scaled},
    ):
        other = Pipeline(dataclasses.replace(parts, **own), name="tiny", devices=one_device.devices)
        assert other.fingerprint != pipe.fingerprint


def test_auxiliary_networks_count_where_they_are_used(tmp_path, classifier, clip):
    pipe = jaxdiff.load(tiny.write_tiny(tmp_path / "tiny"))
    plain = pipe.resolve(PROMPT)
    guided = pipe.resolve(PROMPT, classifier_scale=2.0, clip_scale=1.0)
    assert pipe.auxiliary_fingerprints(plain) == {}
    pipe.load_classifier(classifier)
    pipe.load_clip(clip)
    before = pipe.auxiliary_fingerprints(guided)
    assert before.keys() == {"classifier", "clip"}
    assert pipe.auxiliary_fingerprints(plain) == {}
    replace_weights(pipe._auxiliary.clip, changed(pipe._auxiliary.clip))
    labels = read_object(classifier / PROMPT_LABELS)
    write_object(classifier / PROMPT_LABELS, labels | {"relations": labels["relations"][:-1]})
    pipe.load_classifier(classifier)
    after = pipe.auxiliary_fingerprints(guided)
    assert all(before[name] != after[name] for name in before)
