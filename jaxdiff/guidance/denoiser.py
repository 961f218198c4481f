"""From a network and a guidance rule to the denoiser that samplers call."""

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff.core.errors import InputError
from jaxdiff.core.types import Array, Float, PyTree
from jaxdiff.core.validate import check_shape
from jaxdiff.diffusion.predictions import Denoiser, Prediction
from jaxdiff.diffusion.timesteps import NoiseLevel
from jaxdiff.guidance.rule import Dials, Guidance, Query, Stream

# (weights, x (n h w c), t (n,), conditioning with leaves (n, ...)) -> output (n h w c). It is also
# given `perturbed` (n,), by name, if the rule has perturbed streams.
Network = Callable[..., Array]
T = TypeVar("T")


class Source(NamedTuple):
    """A network: what it is, what it is told, and the kind of its predictions."""

    network: Network
    weights: PyTree
    conditioning: PyTree  # leaves (b, G, ...) for the G streams of a rule that it runs
    kind: str


def stack_streams(*conditionings: PyTree) -> PyTree:
    """Leaves (b, ...) of K conditionings, null first, as leaves (b, K, ...)."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves, axis=1), *conditionings)


def guided(
    network: Network,
    weights: PyTree,
    conditioning: PyTree,
    dials: Dials,
    *,
    rule: Guidance,
    kind: str,
    guide: Source | None = None,
) -> Denoiser:
    """The denoiser of a network that predicts `kind`, guided by `rule`.

    `conditioning` has leaves (b, K, ...) for the rule's K streams of this network; None stands for
    none. All of them, of all images, go through one network call, image by image: [null_0, cond_0,
    null_1, cond_1, ...]. This order keeps the streams of an image on the device of the image when
    the batch is sharded; all nulls before all conditions would have to be exchanged at each step.
    The network sees its own dtype; combining happens in that of x, which is float32. Where the rule
    rests the plain stream is run alone, and where it stands still none. InputError where streams
    and conditioning do not fit.
    """
    rows = {name: _rows(rule.streams, name) for name in ("main", "guide")}
    sources = {"main": Source(network, weights, conditioning, kind)}
    if guide is not None:
        sources["guide"] = guide
    for name, numbers in rows.items():
        if numbers and name not in sources:
            raise InputError("guide: got none, expected a second model for this guidance")
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
                found = _run(sources[name], Query(x, level, kind), streams, places)
                outputs |= dict(zip(chosen, found, strict=True))
        return tuple(outputs[n] for n in wanted)

    def denoise(
        x: Float[Array, "b *d"], level: NoiseLevel, memory: PyTree
    ) -> tuple[Prediction, PyTree]:
        query, every = Query(x, level, kind), range(len(rule.streams))

        def guide_it() -> tuple[Prediction, PyTree]:
            return rule.combine(ask(x, level, every), query, dials, memory)

        def rest() -> tuple[Prediction, PyTree]:
            if rule.plain is None:
                _, cond = rule.ends(ask(x, level, every), dials)
            else:
                (cond,) = ask(x, level, [rule.plain])
            return rule.rest(cond, query), memory

        def stand() -> tuple[Prediction, PyTree]:
            return query.predict(jnp.zeros_like(x), "flow_prediction"), memory

        def move() -> tuple[Prediction, PyTree]:
            return _choose(rule.active(level, memory), guide_it, rest)

        return _choose(rule.still(level), stand, move)

    return denoise


def _choose(condition: bool | Array, then: Callable[[], T], other: Callable[[], T]) -> T:
    """One of two results; where the choice is known beforehand nothing else is compiled."""
    if isinstance(condition, bool):
        return then() if condition else other()
    return jax.lax.cond(condition, then, other)


def _rows(streams: Sequence[Stream], network: str) -> list[int]:
    """The numbers of the streams of one network."""
    return [n for n, stream in enumerate(streams) if stream.network == network]


def _run(
    source: Source, query: Query, streams: Sequence[Stream], places: Sequence[int]
) -> list[Array]:
    """Outputs, as of the query's kind, of streams at `places` of the network's conditioning."""
    x, level, kind = query
    K = len(places)

    def flatten(leaf: Array) -> Array:
        chosen = leaf if leaf.shape[1] == K else leaf[:, np.array(places)]
        return chosen.reshape(-1, *leaf.shape[2:])

    told = {}
    if any(stream.perturbed for stream in streams):
        told["perturbed"] = jnp.tile(jnp.array([s.perturbed for s in streams]), len(x))
    output = source.network(
        source.weights,
        jnp.repeat(x, K, axis=0),
        jnp.broadcast_to(level.t, (len(x) * K,)),
        jax.tree.map(flatten, source.conditioning),
        **told,
    )
    rows = output.astype(x.dtype).reshape(len(x), K, *output.shape[1:])
    outputs = [rows[:, i] for i in range(K)]
    if source.kind == kind:
        return outputs
    theirs = query._replace(kind=source.kind)
    return [query.output(theirs.predict(each)) for each in outputs]
