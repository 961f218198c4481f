"""The symmetric contrastive loss of CLIP (2103.00020), and attribute heads.

A contrastive loss depends only on whether a caption fits an image, so a text encoder's hidden
states need not encode which object is where. Attribute heads require it: they are linear layers on
the pooled state and on the last positions of the context, each of which predicts one object.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff.core.types import Array, Bool, Dtype, Float, Int, Key, NDArray, PyTree
from jaxdiff.models.attributes import LabelSet
from jaxdiff.models.build import abstract, initial_weights, param_dict, with_params
from jaxdiff.models.clip import CLIPModel, unit
from jaxdiff.parallel.sharding import CLIP
from jaxdiff.training.config import CLIPObjective
from jaxdiff.training.step import Metrics, Params, TrainingTask

MAX_LOGIT_SCALE = math.log(100)  # section 2.5: a larger inverse temperature makes training unstable
NEG_INF = -1e9  # a logit without effect in a softmax
T = TypeVar("T")
HEADS = "heads."  # prefix of the paths of the attribute heads' weights


class AttributeHeads(NamedTuple):
    """What the heads predict, and from where.

    Each entry of `slots` names the groups of attributes to predict from one of the text encoder's
    last positions. From the pooled states of text and image all are predicted.
    """

    attributes: LabelSet
    slots: tuple[tuple[str, ...], ...]

    def shapes(self, config: CLIPObjective) -> dict[str, Any]:
        """The shapes of the heads' weights."""
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
        """Which labels each slot predicts."""
        found = np.zeros((len(self.slots), self.attributes.width), bool)
        for row, names in zip(found, self.slots, strict=True):
            for name in names:
                row[self.attributes.slices[name]] = True
        return found


class AttributeLoss(NamedTuple):
    """The loss and accuracy of the heads on a batch."""

    loss: Float[Array, ""]  # negative log-likelihood per sample, summed over heads
    accuracy: Metrics  # of each head, over the groups that are known


def attribute_loss(
    heads: AttributeHeads,
    params: Params,
    hidden_states: Float[Array, "b n d"],
    pooled: Float[Array, "b d"],
    image_pooled: Float[Array, "b e"],
    batch: dict[str, Array],
) -> AttributeLoss:
    """The heads applied to the hidden and pooled states of the text, and to the image's."""
    kernels = {name: params[f"{HEADS}{name}.kernel"] for name in ("text", "slots", "image")}
    count = len(heads.slots)
    hidden_states, pooled, image_pooled = (
        array.astype(jnp.float32) for array in (hidden_states, pooled, image_pooled)
    )
    last = hidden_states[:, hidden_states.shape[1] - count :]
    slot_logits = jnp.einsum("bsd,sdn->sbn", last, kernels["slots"])
    slot_known = batch["text_known"][None] & jnp.asarray(heads.masks())[:, None]
    targets = jnp.broadcast_to(batch["text_targets"], slot_known.shape)
    width = heads.attributes.width
    predictions = {
        "text": (pooled @ kernels["text"], batch["text_targets"], batch["text_known"]),
        "slots": tuple(a.reshape(-1, width) for a in (slot_logits, targets, slot_known)),
        "image": (image_pooled @ kernels["image"], batch["targets"], batch["known"]),
    }
    nats, accuracy = jnp.float32(0), {}
    for name, prediction in predictions.items():
        nats -= jnp.sum(heads.attributes.log_probs(*prediction)) / len(pooled)
        right, known = heads.attributes.correct(*prediction)
        accuracy[f"{name}_attributes"] = jnp.mean(right, where=known, dtype=jnp.float32)
    return AttributeLoss(nats, accuracy)


def same_caption(ids: Int[Array, "b n"]) -> Bool[Array, "b b"]:
    """Which pairs of captions have the same tokens."""
    return jnp.all(ids[:, None] == ids[None], axis=-1)


def mask_duplicate_captions(
    scores: Float[Array, "b b"], same: Bool[Array, "b b"]
) -> Float[Array, "b b"]:
    """`scores` without the pairs of different samples that have the `same` caption."""
    return jnp.where(same & ~jnp.eye(len(scores), dtype=bool), NEG_INF, scores)


def contrastive_loss(
    logits: Float[Array, "b b"],
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Cross-entropy of image -> text and of text -> image; rows are images.

    Matching pairs are on the diagonal.
    """
    image_to_text = -jnp.mean(jnp.diagonal(jax.nn.log_softmax(logits, axis=1)))
    text_to_image = -jnp.mean(jnp.diagonal(jax.nn.log_softmax(logits, axis=0)))
    return image_to_text, text_to_image


def retrieval(scores: Float[Array, "b b"], variations: int) -> Metrics:
    """Retrieval accuracy of captions: among all, and in each block of variations (hard negatives).

    Blocks are runs of `variations` images that differ by one minimal change.
    """
    b = len(scores)
    target = jnp.arange(b)
    first = target - target % variations
    columns = first[:, None] + jnp.arange(variations)[None]
    within_block = jnp.take_along_axis(scores, columns, axis=1)
    return {
        "retrieval": jnp.mean(jnp.argmax(scores, axis=1) == target, dtype=jnp.float32),
        "retrieval_hard": jnp.mean(
            jnp.argmax(within_block, axis=1) == target % variations, dtype=jnp.float32
        ),
    }


def split_heads(params: dict[str, T]) -> tuple[dict[str, T], dict[str, T]]:
    """The weights of the towers, and those of the attribute heads."""
    heads = {path: array for path, array in params.items() if path.startswith(HEADS)}
    return {path: array for path, array in params.items() if path not in heads}, heads


class Towers(NamedTuple):
    """The outputs of both towers for a batch."""

    hidden_states: Float[Array, "b n d"]  # of the text encoder
    pooled: Float[Array, "b d"]  # of the text encoder
    image_pooled: Float[Array, "b e"]  # of the vision encoder
    similarity: Float[Array, "b b"]  # cosines of images (rows) and captions, in float32


def run_towers(model: CLIPModel, images: Float[Array, "b h w c"], ids: Int[Array, "b n"]) -> Towers:
    """Run both towers."""
    text, image = model.text_model(ids), model.vision_model(images).pooled
    pooled = cast(Array, text.pooled)
    embeds = unit(model.visual_projection(image)), unit(model.text_projection(pooled))
    return Towers(text.last, pooled, image, embeds[0] @ embeds[1].T)


def clip_task(
    config: CLIPObjective, dtype: Dtype = jnp.float32, heads: AttributeHeads | None = None
) -> TrainingTask:
    """CLIP's task; batches have `image` (b, h, w, 3) in [-1, 1] and `ids` (b, n) int32.

    With `heads` they also have `targets`, `known`, `text_targets` and `text_known` (b, labels), see
    `models.attributes`, for images and their captions.
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
        tower_params, head_params = split_heads(params)
        towers = run_towers(with_params(template, tower_params), batch["image"], batch["ids"])
        similarity = towers.similarity
        scale = jnp.exp(params["logit_scale"])
        scores = mask_duplicate_captions(scale * similarity, same_caption(batch["ids"]))
        image_to_text, text_to_image = contrastive_loss(scores)
        parts = {
            "image_to_text_loss": image_to_text,
            "text_to_image_loss": text_to_image,
            "accuracy": retrieval(scores, 1)["retrieval"],
            "logit_scale": scale,
        }
        total = 0.5 * (image_to_text + text_to_image)
        if heads is None:
            return total, parts
        attributes = attribute_loss(heads, head_params, *towers[:3], batch)
        total += config.attribute_weight * attributes.loss
        return total, parts | {"attribute_loss": attributes.loss} | attributes.accuracy

    def project_params(params: Params) -> Params:
        scale = jnp.minimum(params["logit_scale"], MAX_LOGIT_SCALE)
        return params | {"logit_scale": scale}

    head_shapes = {} if heads is None else heads.shapes(config)
    return TrainingTask(param_dict(template) | head_shapes, init, loss, project_params, rules=CLIP)
