"""From a network and a guidance rule to the denoiser that samplers call."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff.core.errors import InputError
from jaxdiff.core.types import Array, Float, PyTree
from jaxdiff.core.validate import check_shape
from jaxdiff.diffusion.denoising import Denoiser, NoiseLevel, Prediction
from jaxdiff.guidance.base import GUIDED, DenoiserInput, Guidance, GuidanceScales, Outputs, Stream
from jaxdiff.guidance.learned_variance import LearnedVariance
from jaxdiff.guidance.modes import denoise_by_mode

# (weights, x (n h w c), t (n,), conditioning with leaves (n, ...)) -> output (n h w c). It is also
# given, by name, `perturbed` (n,) if the rule has perturbed streams, and `variance=True` if it is
# asked for 2c channels, the second half of them a learned variance.
Network = Callable[..., Array]


class ConditionedNetwork(NamedTuple):
    """A network with its weights, its conditioning and its prediction type."""

    network: Network
    weights: PyTree
    conditioning: PyTree  # leaves (b, G, ...) for the G streams of a rule that it runs
    prediction_type: str
    variance: bool = False  # whether it is asked for the variance that it learns


def stack_streams(*conditionings: PyTree) -> PyTree:
    """Leaves (b, ...) of K conditionings, null first, as leaves (b, K, ...)."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves, axis=1), *conditionings)


def guided_denoiser(
    network: Network,
    weights: PyTree,
    conditioning: PyTree,
    scales: GuidanceScales,
    *,
    rule: Guidance,
    prediction_type: str,
    guidance_model: ConditionedNetwork | None = None,
    variance: bool = False,
    uniform: bool = False,
) -> Denoiser:
    """The denoiser of a network that predicts `prediction_type`, guided by `rule`.

    `conditioning` has leaves (b, K, ...) for the rule's K streams of this network; None stands for
    none. All of them, of all images, go through one network call, image by image: [null_0, cond_0,
    null_1, cond_1, ...]. This order keeps the streams of an image on the device of the image when
    the batch is sharded; all nulls before all conditions would have to be exchanged at each step.
    The network sees its own dtype; combining happens in that of x, which is float32. With
    `variance` its predictions have the variance that it learns, see `LearnedVariance`; `uniform` is
    that of `denoise_by_mode`. InputError where streams and conditioning do not fit.
    """
    main = ConditionedNetwork(network, weights, conditioning, prediction_type, variance)
    rule = LearnedVariance(inner=rule) if variance else rule
    networks = {"main": main, "guidance_model": guidance_model}
    _check_networks(networks, rule.streams)

    def denoise(
        x: Float[Array, "b *d"], level: NoiseLevel, state: PyTree
    ) -> tuple[Prediction, PyTree]:
        inputs = DenoiserInput(x, level, prediction_type)

        def call_streams(wanted: Sequence[int]) -> Outputs:  # the outputs of these streams
            return _outputs(networks, rule.streams, inputs, wanted)

        mode = rule.mode(level, state)
        if isinstance(mode, int) and mode == GUIDED:
            return rule.combine(call_streams(range(len(rule.streams))), inputs, scales, state)
        return denoise_by_mode(mode, rule, call_streams, inputs, scales, state, uniform=uniform)

    return denoise


def _check_networks(
    networks: Mapping[str, ConditionedNetwork | None], streams: Sequence[Stream]
) -> None:
    """InputError unless each network that streams need is there, with conditioning for them."""
    for name, source in networks.items():
        count = sum(stream.network == name for stream in streams)
        if count and source is None:
            raise InputError(f"{name}: got none, expected the weaker model that this rule needs")
        for leaf in jax.tree.leaves(source.conditioning if count and source else None):
            check_shape("conditioning", leaf, (None, count, *leaf.shape[2:]))


def _outputs(
    networks: Mapping[str, ConditionedNetwork | None],
    streams: Sequence[Stream],
    inputs: DenoiserInput,
    wanted: Sequence[int],
) -> Outputs:
    """The outputs of the streams `wanted`, from one call of each network."""
    outputs: dict[int, Array] = {}
    main = cast(ConditionedNetwork, networks["main"])
    for name, source in networks.items():
        own = [n for n, stream in enumerate(streams) if stream.network == name]
        chosen = [n for n in own if n in wanted]
        if source is not None and chosen:
            rows = [own.index(n) for n in chosen]
            called = _call(source, inputs, [streams[n] for n in chosen], rows)
            if main.variance and not source.variance:  # a weaker network's is not read
                called = [jnp.concatenate([y, jnp.zeros_like(y)], axis=-1) for y in called]
            outputs |= dict(zip(chosen, called, strict=True))
    return tuple(outputs[n] for n in wanted)


def _call(
    source: ConditionedNetwork,
    inputs: DenoiserInput,
    streams: Sequence[Stream],
    rows: Sequence[int],
) -> list[Array]:
    """Outputs, as of `inputs.prediction_type`, of streams at `rows` of the conditioning."""
    x, level, prediction_type = inputs
    K = len(rows)

    def flatten(leaf: Array) -> Array:
        chosen = leaf if leaf.shape[1] == K else leaf[:, np.array(rows)]
        return chosen.reshape(-1, *leaf.shape[2:])

    options: dict[str, Any] = {"variance": True} if source.variance else {}
    if any(stream.perturbed for stream in streams):
        options["perturbed"] = jnp.tile(jnp.array([s.perturbed for s in streams]), len(x))
    output = source.network(
        source.weights,
        jnp.repeat(x, K, axis=0),
        jnp.repeat(jnp.broadcast_to(level.t, (len(x),)), K),
        jax.tree.map(flatten, source.conditioning),
        **options,
    )
    by_stream = output.astype(x.dtype).reshape(len(x), K, *output.shape[1:])
    outputs = [by_stream[:, i] for i in range(K)]
    if source.prediction_type == prediction_type:
        return outputs
    theirs = inputs._replace(prediction_type=source.prediction_type)
    return [inputs.output(theirs.predict(each)) for each in outputs]
