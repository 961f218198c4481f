"""From a network and a guidance rule to the denoiser that samplers call."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff.core.errors import InputError
from jaxdiff.core.types import Array, Float, PyTree
from jaxdiff.core.validate import check_shape
from jaxdiff.diffusion.predictions import Denoiser, Prediction, select
from jaxdiff.diffusion.timesteps import NoiseLevel
from jaxdiff.guidance.base import GUIDED, SKIP, DenoiserInput, Guidance, GuidanceScales, Stream

# (weights, x (n h w c), t (n,), conditioning with leaves (n, ...)) -> output (n h w c). It is also
# given `perturbed` (n,), by name, if the rule has perturbed streams.
Network = Callable[..., Array]


class ConditionedNetwork(NamedTuple):
    """A network with its weights, its conditioning and its prediction type."""

    network: Network
    weights: PyTree
    conditioning: PyTree  # leaves (b, G, ...) for the G streams of a rule that it runs
    prediction_type: str


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
) -> Denoiser:
    """The denoiser of a network that predicts `prediction_type`, guided by `rule`.

    `conditioning` has leaves (b, K, ...) for the rule's K streams of this network; None stands for
    none. All of them, of all images, go through one network call, image by image: [null_0, cond_0,
    null_1, cond_1, ...]. This order keeps the streams of an image on the device of the image when
    the batch is sharded; all nulls before all conditions would have to be exchanged at each step.
    The network sees its own dtype; combining happens in that of x, which is float32. Where the rule
    guides no image the conditional stream is run alone, and where it skips all none. InputError
    where streams and conditioning do not fit.
    """
    rows = {name: _rows(rule.streams, name) for name in ("main", "guidance_model")}
    sources = {"main": ConditionedNetwork(network, weights, conditioning, prediction_type)}
    if guidance_model is not None:
        sources["guidance_model"] = guidance_model
    for name, numbers in rows.items():
        if numbers and name not in sources:
            raise InputError(
                "guidance_model: got none, expected the weaker model that this rule needs"
            )
        for leaf in jax.tree.leaves(sources[name].conditioning if numbers else None):
            check_shape("conditioning", leaf, (None, len(numbers), *leaf.shape[2:]))

    def ask(x: Float[Array, "b *d"], level: NoiseLevel, wanted: Sequence[int]) -> tuple[Array, ...]:
        """The outputs of the streams `wanted`, from one call of each network."""
        outputs: dict[int, Array] = {}
        for name, numbers in rows.items():
            chosen = [n for n in numbers if n in wanted]
            if chosen:
                places = [numbers.index(n) for n in chosen]
                streams = [rule.streams[n] for n in chosen]
                found = _run(
                    sources[name], DenoiserInput(x, level, prediction_type), streams, places
                )
                outputs |= dict(zip(chosen, found, strict=True))
        return tuple(outputs[n] for n in wanted)

    def denoise(
        x: Float[Array, "b *d"], level: NoiseLevel, state: PyTree
    ) -> tuple[Prediction, PyTree]:
        query, every = DenoiserInput(x, level, prediction_type), range(len(rule.streams))

        wanted = rule.mode(level, state)
        if isinstance(wanted, int) and wanted == GUIDED:
            return rule.combine(ask(x, level, every), query, scales, state)
        mode = jnp.where(level.active, wanted, SKIP)

        def skip() -> tuple[Prediction, PyTree]:
            return query.predict(jnp.zeros_like(x), "flow_prediction"), state

        def unguided(cond: Float[Array, "b *d"]) -> tuple[Prediction, PyTree]:
            return select(mode == SKIP, skip(), (rule.unguided(cond, query), state))

        def conditional() -> tuple[Prediction, PyTree]:
            if rule.cond_stream is not None:
                return unguided(*ask(x, level, [rule.cond_stream]))
            return unguided(rule.uncond_and_cond(ask(x, level, every), scales)[1])

        def guided() -> tuple[Prediction, PyTree]:
            outputs = ask(x, level, every)
            cond = rule.uncond_and_cond(outputs, scales)[1]
            combined = rule.combine(outputs, query, scales, state)
            return select(mode == GUIDED, combined, unguided(cond))

        # by what the image that needs most needs; each has its own of it
        return jax.lax.switch(jnp.max(mode), (skip, conditional, guided))

    return denoise


def _rows(streams: Sequence[Stream], network: str) -> list[int]:
    """The numbers of the streams of one network."""
    return [n for n, stream in enumerate(streams) if stream.network == network]


def _run(
    source: ConditionedNetwork,
    inputs: DenoiserInput,
    streams: Sequence[Stream],
    places: Sequence[int],
) -> list[Array]:
    """Outputs, as of the query's kind, of streams at `places` of the network's conditioning."""
    x, level, kind = inputs
    K = len(places)

    def flatten(leaf: Array) -> Array:
        chosen = leaf if leaf.shape[1] == K else leaf[:, np.array(places)]
        return chosen.reshape(-1, *leaf.shape[2:])

    options = {}
    if any(stream.perturbed for stream in streams):
        options["perturbed"] = jnp.tile(jnp.array([s.perturbed for s in streams]), len(x))
    output = source.network(
        source.weights,
        jnp.repeat(x, K, axis=0),
        jnp.repeat(jnp.broadcast_to(level.t, (len(x),)), K),
        jax.tree.map(flatten, source.conditioning),
        **options,
    )
    rows = output.astype(x.dtype).reshape(len(x), K, *output.shape[1:])
    outputs = [rows[:, i] for i in range(K)]
    if source.prediction_type == kind:
        return outputs
    theirs = inputs._replace(prediction_type=source.prediction_type)
    return [inputs.output(theirs.predict(each)) for each in outputs]
