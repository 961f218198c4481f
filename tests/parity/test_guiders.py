"""Guidance rules against the guiders of diffusers that compute the same."""

import diffusers.guiders as theirs
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from copier import agree, image, nchw
from diffusers.hooks import LayerSkipConfig
from oracles import level_at

from jaxdiff.guidance.base import DenoiserInput, GuidanceScales, parse
from jaxdiff.guidance.denoiser import guided_denoiser

SHAPE = (3, 6, 5, 4)
X, UNCOND, COND, PERTURBED = (image(SHAPE, seed=seed) for seed in range(4))
STEPS = 10


def raw(text, outputs, w, *, kind="epsilon", step=5, memory=None):
    """The network's output that our rule stands for, and its memory."""
    rule = parse(text)
    query = DenoiserInput(
        jnp.asarray(X), level_at(jnp.float32(1.0), step=step, steps=STEPS, ndim=X.ndim), kind
    )
    memory = rule.init_state(query.x) if memory is None else memory
    outputs = tuple(jnp.asarray(output) for output in outputs)
    prediction, memory = rule.combine(outputs, query, GuidanceScales(jnp.full(len(X), w)), memory)
    return query.output(prediction), memory


def pred(guider, *outputs, step=5, **named):
    """What a guider makes of conditional and null outputs."""
    guider.set_state(step, STEPS, torch.tensor(500))
    return guider(*(nchw(o) for o in outputs), **{k: nchw(o) for k, o in named.items()}).pred


class Called:
    """A guider whose `forward` is called directly, as pipelines do after preparing the batches."""

    def __init__(self, guider):
        self.guider = guider

    def set_state(self, *state):
        self.guider.set_state(*state)

    def __call__(self, *outputs, **named):
        return self.guider.forward(*outputs, **named)


@pytest.mark.parametrize("w", [0.0, 1.0, 3.0, 15.0])
def test_classifier_free(w):
    guider = Called(theirs.ClassifierFreeGuidance(guidance_scale=w))
    agree(raw("cfg", (UNCOND, COND), w)[0], pred(guider, COND, UNCOND))


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("phi", [0.3, 0.7, 1.0])
def test_rescale(phi, kind):
    guider = Called(theirs.ClassifierFreeGuidance(guidance_scale=7.5, guidance_rescale=phi))
    got, _ = raw(f"cfg+rescale:phi={phi}", (UNCOND, COND), 7.5, kind=kind)
    agree(got, pred(guider, COND, UNCOND))


def test_projected():
    """Theirs begins at the null stream by default; the paper's form is their original one, whose
    scale is w - 1. It works on what it is given, so a network of denoised images is taken."""
    w, options = 4.0, {"eta": 0.3, "momentum": -0.5, "norm_threshold": 8.0}
    guider = Called(
        theirs.AdaptiveProjectedGuidance(
            guidance_scale=w - 1,
            adaptive_projected_guidance_momentum=options["momentum"],
            adaptive_projected_guidance_rescale=options["norm_threshold"],
            eta=options["eta"],
            use_original_formulation=True,
        )
    )
    guider.guider.set_state(0, STEPS, torch.tensor(900))
    guider.guider.momentum_buffer = theirs.adaptive_projected_guidance.MomentumBuffer(-0.5)
    text, memory = "apg:" + ",".join(f"{k}={v}" for k, v in options.items()), None
    for step, (uncond, cond) in enumerate([(UNCOND, COND), (PERTURBED, COND), (COND, UNCOND)]):
        got, memory = raw(text, (uncond, cond), w, kind="sample", step=step, memory=memory)
        agree(got, pred(guider, cond, uncond, step=step))


@pytest.mark.parametrize("step", [0, 1, 2, 5])
def test_zero_star(step):
    guider = Called(theirs.ClassifierFreeZeroStarGuidance(guidance_scale=5.0, zero_init_steps=2))
    rule, kind = parse("cfg-zero-star:zero_steps=2"), "flow_prediction"
    query = DenoiserInput(
        jnp.asarray(X), level_at(jnp.float32(1.0), step=step, steps=STEPS, ndim=X.ndim), kind
    )
    both, dials = jnp.stack([UNCOND, COND], axis=1), GuidanceScales(jnp.full(len(X), 5.0))
    denoise = guided_denoiser(
        lambda w, x, t, told: told, (), both, dials, rule=rule, prediction_type=kind
    )
    got = query.output(denoise(query.x, query.level, ())[0])
    # both moved, for an error relative to zero would be none
    agree(got + COND, pred(guider, COND, UNCOND, step=step) + nchw(COND))


def test_perturbed_attention_beside_cfg():
    guider = Called(
        theirs.PerturbedAttentionGuidance(
            guidance_scale=5.0,
            perturbed_guidance_scale=2.5,
            perturbed_guidance_start=0.0,
            perturbed_guidance_stop=1.0,
            perturbed_guidance_layers=[0],
        )
    )
    got, _ = raw("pag:scale=2.5", (UNCOND, COND, PERTURBED), 5.0)
    agree(got, pred(guider, COND, UNCOND, pred_cond_skip=PERTURBED))


def test_perturbed_attention_alone_differs_by_one():
    """Their guider begins at the perturbed output, the paper (2403.17377, eq. 14) at the
    conditional one: their k is ours and one more."""
    guider = Called(
        theirs.PerturbedAttentionGuidance(
            guidance_scale=1.0,
            perturbed_guidance_scale=3.5,
            perturbed_guidance_start=0.0,
            perturbed_guidance_stop=1.0,
            perturbed_guidance_layers=[0],
        )
    )
    rule = parse("pag:scale=2.5").simplify([1.0])
    query = DenoiserInput(jnp.asarray(X), level_at(jnp.float32(1.0), ndim=X.ndim), "epsilon")
    outputs = jnp.asarray(COND), jnp.asarray(PERTURBED)
    got, _ = rule.combine(outputs, query, GuidanceScales(jnp.ones(len(X))), ())
    agree(query.output(got), pred(guider, COND, pred_cond_skip=PERTURBED))


def test_away_from_a_weaker_model():
    """Theirs makes the weaker model by dropping layers of the main one; the rule is the same."""
    layers = LayerSkipConfig(indices=[0])
    guider = Called(
        theirs.AutoGuidance(guidance_scale=2.2, auto_guidance_config=layers, dropout=0.1)
    )
    agree(raw("autoguidance", (UNCOND, COND), 2.2)[0], pred(guider, COND, UNCOND))


def test_guidance_within_steps():
    """Theirs limits guidance by the share of steps, ours by noise; inside and outside agree."""
    guider = Called(theirs.ClassifierFreeGuidance(guidance_scale=3.0, start=0.2, stop=0.6))
    for step in range(STEPS):
        inside = 2 <= step < 6
        expected = raw("cfg" if inside else "none", (UNCOND, COND)[not inside :], 3.0)[0]
        agree(expected, pred(guider, COND, UNCOND, step=step))
    assert np.max(np.abs(UNCOND - COND)) > 1
