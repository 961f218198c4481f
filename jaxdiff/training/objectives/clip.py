"""Which caption belongs to which picture: the symmetric contrastive loss of CLIP (2103.00020).

A contrastive loss asks only whether a caption fits a picture, so the states of a text encoder need
not say which object is where. Attribute heads ask for that: linear maps of the end-of-text state
and of the last positions of the context, each of which must know the object of one place.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff.core.types import Array, Bool, Dtype, Float, Int, Key, NDArray, PyTree
from jaxdiff.models.attributes import LabelSet
from jaxdiff.models.build import abstract, initial_weights, param_dict, with_params
from jaxdiff.models.clip import CLIPModel, unit
from jaxdiff.parallel.sharding import CLIP
from jaxdiff.training.config import CLIPObjective
from jaxdiff.training.objectives import Learner, Metrics, Params

MAX_LOGIT_SCALE = math.log(100)  # section 2.5: a larger inverse temperature makes training unstable
FAR = -1e9  # a logit that no softmax notices
T = TypeVar("T")
HEADS = "heads."  # in front of the paths of the attribute heads' weights


class AttributeHeads(NamedTuple):
    """What heads learn to read, and from where.

    Each entry of `slots` names the groups of attributes that one of the text encoder's last
    positions must know. The end-of-text state and the image's must know all.
    """

    attributes: LabelSet
    slots: tuple[tuple[str, ...], ...]

    def shapes(self, config: CLIPObjective) -> dict[str, Any]:
        """The weights of the heads."""
        d, n = config.text.hidden_size, self.attributes.width
        kernels = {
            "text": (d, n),
            "slots": (len(self.slots), d, n),
            "image": (config.vision.hidden_size, n),
        }
        return {
            f"{HEADS}{name}.kernel": jax.ShapeDtypeStruct(shape, jnp.float32)
            for name, shape in kernels.items()
        }

    def masks(self) -> Bool[NDArray, "s n"]:
        """The labels that each slot is asked for."""
        found = np.zeros((len(self.slots), self.attributes.width), bool)
        for row, names in zip(found, self.slots, strict=True):
            for name in names:
                row[self.attributes.slices[name]] = True
        return found


class Read(NamedTuple):
    """What the heads make of a batch."""

    nats: Float[Array, ""]  # negative log-likelihood a sample, of all heads together
    accuracy: Metrics  # of each head, the share of its known groups that it has right


def read_attributes(
    heads: AttributeHeads,
    params: Params,
    states: Float[Array, "b n d"],
    end: Float[Array, "b d"],
    image: Float[Array, "b e"],
    batch: dict[str, Array],
) -> Read:
    """The heads applied to a text encoder's `states`, its state at the `end`, and an `image`'s."""
    kernels = {name: params[f"{HEADS}{name}.kernel"] for name in ("text", "slots", "image")}
    count = len(heads.slots)
    states, end, image = (array.astype(jnp.float32) for array in (states, end, image))
    last = states[:, states.shape[1] - count :]
    of_slots = jnp.einsum("bsd,sdn->sbn", last, kernels["slots"])
    asked = batch["text_known"][None] & jnp.asarray(heads.masks())[:, None]
    targets = jnp.broadcast_to(batch["text_targets"], asked.shape)
    width = heads.attributes.width
    answers = {
        "text": (end @ kernels["text"], batch["text_targets"], batch["text_known"]),
        "slots": tuple(a.reshape(-1, width) for a in (of_slots, targets, asked)),
        "image": (image @ kernels["image"], batch["targets"], batch["known"]),
    }
    nats, accuracy = jnp.float32(0), {}
    for name, answer in answers.items():
        nats -= jnp.sum(heads.attributes.log_probs(*answer)) / len(end)
        right, known = heads.attributes.correct(*answer)
        accuracy[f"{name}_attributes"] = jnp.mean(right, where=known, dtype=jnp.float32)
    return Read(nats, accuracy)


def same_caption(ids: Int[Array, "b n"]) -> Bool[Array, "b b"]:
    """Which pairs of captions have identical tokens."""
    return jnp.all(ids[:, None] == ids[None], axis=-1)


def without_doubles(scores: Float[Array, "b b"], same: Bool[Array, "b b"]) -> Float[Array, "b b"]:
    """`scores` with the pairs of `same` captions far down: another's caption that is right too."""
    return jnp.where(same & ~jnp.eye(len(scores), dtype=bool), FAR, scores)


def contrastive_loss(
    logits: Float[Array, "b b"],
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Cross-entropy of picture -> caption and of caption -> picture; rows are pictures.

    The right answer is on the diagonal.
    """
    to_caption = -jnp.mean(jnp.diagonal(jax.nn.log_softmax(logits, axis=1)))
    to_picture = -jnp.mean(jnp.diagonal(jax.nn.log_softmax(logits, axis=0)))
    return to_caption, to_picture


def retrieval(scores: Float[Array, "b b"], variations: int) -> Metrics:
    """How often the right caption is the nearest: among all, and in its block of variations.

    Blocks are runs of `variations` pictures that differ in one thing: telling them apart takes
    more than listing what is there.
    """
    b = len(scores)
    right = jnp.arange(b)
    first = right - right % variations
    columns = first[:, None] + jnp.arange(variations)[None]
    own = jnp.take_along_axis(scores, columns, axis=1)
    return {
        "retrieval": jnp.mean(jnp.argmax(scores, axis=1) == right, dtype=jnp.float32),
        "retrieval_hard": jnp.mean(
            jnp.argmax(own, axis=1) == right % variations, dtype=jnp.float32
        ),
    }


def split_heads(params: dict[str, T]) -> tuple[dict[str, T], dict[str, T]]:
    """The weights of the towers, and those of the attribute heads."""
    heads = {path: array for path, array in params.items() if path.startswith(HEADS)}
    return {path: array for path, array in params.items() if path not in heads}, heads


class Towers(NamedTuple):
    """What both towers make of a batch."""

    states: Float[Array, "b n d"]  # of the text encoder
    end: Float[Array, "b d"]  # its state at the end of the text
    image: Float[Array, "b e"]  # the image's state
    cosines: Float[Array, "b b"]  # between images (rows) and captions, in float32


def run_towers(model: CLIPModel, images: Float[Array, "b h w c"], ids: Int[Array, "b n"]) -> Towers:
    """Both towers, once."""
    text, image = model.text_model(ids), model.vision_model(images).pooled
    embeds = unit(model.visual_projection(image)), unit(model.text_projection(text.pooled))
    return Towers(text.last, text.pooled, image, embeds[0] @ embeds[1].T)


def clip_learner(
    config: CLIPObjective, dtype: Dtype = jnp.float32, heads: AttributeHeads | None = None
) -> Learner:
    """CLIP's learner; batches have `image` (b, h, w, 3) in [-1, 1] and `ids` (b, n) int32.

    With `heads` they also have `targets`, `known`, `text_targets` and `text_known` (b, labels), as
    `models.attributes` says of the images and of their captions.
    """
    sizes = (config.text, config.vision, config.projection_dim)
    template = abstract(CLIPModel, *sizes, dtype=dtype)

    def init(seed: int) -> Iterator[tuple[str, NDArray]]:
        for path, array in initial_weights(template, seed):
            scale = path == "logit_scale"
            yield path, np.full_like(array, math.log(config.logit_scale)) if scale else array
        for path, shape in head_shapes.items():
            yield path, np.zeros(shape.shape, np.float32)

    def loss(
        params: Params, frozen: PyTree, batch: dict[str, Array], key: Key[Array, "..."]
    ) -> tuple[Array, Metrics]:
        own, reading = split_heads(params)
        found = run_towers(with_params(template, own), batch["image"], batch["ids"])
        cosines = found.cosines
        scale = jnp.exp(params["logit_scale"])
        scores = without_doubles(scale * cosines, same_caption(batch["ids"]))
        to_caption, to_picture = contrastive_loss(scores)
        parts = {
            "to_caption": to_caption,
            "to_picture": to_picture,
            "accuracy": retrieval(scores, 1)["retrieval"],
            "logit_scale": scale,
        }
        total = 0.5 * (to_caption + to_picture)
        if heads is None:
            return total, parts
        read = read_attributes(heads, reading, *found[:3], batch)
        total += config.attribute_weight * read.nats
        return total, parts | {"attribute_nats": read.nats} | read.accuracy

    def limit(params: Params) -> Params:
        scale = jnp.minimum(params["logit_scale"], MAX_LOGIT_SCALE)
        return params | {"logit_scale": scale}

    head_shapes = {} if heads is None else heads.shapes(config)
    return Learner(param_dict(template) | head_shapes, init, loss, limit, rules=CLIP)
