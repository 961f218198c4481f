"""Which weights of a diffusion model are its parameters, and how the whole is made of them.

Weights are tables by dotted path, one for each network. Parameters that are all of the UNet have
its paths; all others begin with their network's name: `unet.`, `text_encoder.`.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxdiff.core.types import Float, NDArray
from jaxdiff.models.build import initial_weights, param_dict
from jaxdiff.models.clip import TOKEN_EMBEDDING, CLIPTextModel, extend_token_embedding
from jaxdiff.models.conditioning import ENCODERS, unused_parameters
from jaxdiff.models.lora import inject_lora, is_lora_param
from jaxdiff.parallel.sharding import ANY, UNET, Rules
from jaxdiff.training.config import LoRA

Networks = Mapping[str, nnx.Module]  # abstract: unet, vae and the text encoders
Table = dict[str, Any]  # arrays, or their shapes, by path
Tables = dict[str, Table]  # by network
Initial = Iterator[tuple[str, NDArray]]
Given = Callable[[], Tables]  # reads the weights that networks begin with, where they are needed


class Tuned(NamedTuple):
    """A model whose weights are partly parameters and partly frozen."""

    networks: Networks
    frozen: tuple[str, ...]  # networks whose own weights are not parameters
    shapes: Table  # of the parameters
    init: Callable[[int], Initial]  # seed -> path and initial value of each parameter
    # parameters, weights of the frozen networks -> weights of each network
    join: Callable[[Table, Tables], Tables]
    rules: Rules = ANY


def unet_only(networks: Networks, given: Given = dict) -> Tuned:
    """All weights of the UNet are parameters; they begin as those `given`, or at random."""
    frozen = tuple(name for name in networks if name != "unet")

    def join(params: Table, frozen: Tables) -> Tables:
        return {**frozen, "unet": params}

    def init(seed: int) -> Initial:
        yield from _begin(networks["unet"], given().get("unet"), seed)

    return Tuned(networks, frozen, param_dict(networks["unet"]), init, join, UNET)


def with_encoders(networks: Networks, given: Given) -> Tuned:
    """The weights of the UNet and the text encoders are parameters, those `given` begin so.

    All of them but what no condition depends on: weight decay alone would change it.
    """
    names, still = [name for name in networks if name != "vae"], _unheard(networks)

    def heard(name: str, path: str) -> bool:
        return not path.startswith(still.get(name, ()))

    def init(seed: int) -> Initial:
        tables = given()
        for name in names:
            for path, array in _begin(networks[name], tables.get(name), seed):
                if heard(name, path):
                    yield f"{name}.{path}", array

    def join(params: Table, frozen: Tables) -> Tables:
        trained = divided(params)
        rest = {name: {**frozen.get(name, {}), **table} for name, table in trained.items()}
        return {**frozen, **rest}

    every = {name: param_dict(networks[name]) for name in names}
    shapes = {
        name: {path: leaf for path, leaf in table.items() if heard(name, path)}
        for name, table in every.items()
    }
    kept = [name for name in names if shapes[name].keys() != every[name].keys()]
    return Tuned(networks, ("vae", *kept), joined(shapes), init, join)


def _unheard(networks: Networks) -> dict[str, tuple[str, ...]]:
    """How the paths begin of weights of text encoders that nothing depends on."""
    pooled = cast(Any, networks["unet"]).config.addition_embed_type is not None
    names = [name for name in ENCODERS if name in networks]
    return {
        name: unused_parameters(
            cast(CLIPTextModel, networks[name]), pooled=pooled, last=name == names[-1]
        )
        for name in names
    }


def low_rank(networks: Networks, config: LoRA) -> Tuned:
    """The factors of low-rank changes are parameters."""
    targets = {"unet": config.target_modules} | dict.fromkeys(ENCODERS, config.text_target_modules)
    changed, still = dict(networks), _unheard(networks)
    for name in networks.keys() & targets:
        size = {"rank": config.rank, "scale": config.scale}
        but = still.get(name, ())
        changed[name] = inject_lora(networks[name], targets[name], exclude=but, **size)
    touched = {name: net for name, net in changed.items() if targets.get(name)}

    def init(seed: int) -> Initial:
        for name, network in touched.items():
            every = initial_weights(network, seed, only=is_lora_param)
            yield from _prefixed(name, every)

    def join(params: Table, frozen: Tables) -> Tables:
        factors = divided(params)
        return {name: {**table, **factors.get(name, {})} for name, table in frozen.items()}

    shapes = joined(
        {
            name: {path: leaf for path, leaf in param_dict(network).items() if is_lora_param(path)}
            for name, network in touched.items()
        }
    )
    return Tuned(changed, tuple(networks), shapes, init, join)


def new_word(
    networks: Networks, vectors: Mapping[str, Float[NDArray, "n _"]], first: Mapping[str, int]
) -> Tuned:
    """Vectors of a new word are parameters, for each text encoder; `first` is the id of the first.

    The word of several vectors is as many ids. Parameters are called `text_encoder.vectors`.
    """
    longer = dict(networks)
    for name, rows in vectors.items():
        encoder = cast(CLIPTextModel, nnx.clone(networks[name]))
        shape = (first[name] + len(rows), rows.shape[1])
        encoder.text_model.embeddings.token_embedding.embedding = nnx.Param(
            jax.ShapeDtypeStruct(shape, jnp.float32)
        )
        longer[name] = encoder

    def init(seed: int) -> Initial:
        del seed  # nothing is drawn
        for name, rows in vectors.items():
            yield f"{name}.vectors", np.asarray(rows, np.float32)

    def join(params: Table, frozen: Tables) -> Tables:
        tables = dict(frozen)
        for name in vectors:
            table, added = frozen[name][TOKEN_EMBEDDING], params[f"{name}.vectors"]
            tables[name] = {
                **frozen[name],
                TOKEN_EMBEDDING: extend_token_embedding(table, first[name], added),
            }
        return tables

    shapes = {
        f"{name}.vectors": jax.ShapeDtypeStruct(rows.shape, jnp.float32)
        for name, rows in vectors.items()
    }
    return Tuned(longer, tuple(networks), shapes, init, join)


def joined(tables: Mapping[str, Mapping[str, Any]]) -> Table:
    """Tables by network as one, whose paths begin with the network's name."""
    return {f"{name}.{path}": leaf for name, t in tables.items() for path, leaf in t.items()}


def divided(params: Mapping[str, Any]) -> Tables:
    """The inverse of `joined`."""
    tables: Tables = {}
    for path, leaf in params.items():
        name, _, rest = path.partition(".")
        tables.setdefault(name, {})[rest] = leaf
    return tables


def _begin(network: nnx.Module, given: Mapping[str, Any] | None, seed: int) -> Initial:
    if given is None:
        yield from initial_weights(network, seed)
    else:
        for path, array in given.items():
            yield path, np.asarray(array, np.float32)


def _prefixed(name: str, values: Iterable[tuple[str, NDArray]]) -> Initial:
    for path, array in values:
        yield f"{name}.{path}", array
