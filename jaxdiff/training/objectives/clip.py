"""Which caption belongs to which picture: the symmetric contrastive loss of CLIP (2103.00020)."""

import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff.core.types import Array, Bool, Dtype, Float, Int, Key, NDArray, PyTree
from jaxdiff.models.build import abstract, initial_weights, param_dict, with_params
from jaxdiff.models.clip import CLIPModel
from jaxdiff.parallel.sharding import CLIP
from jaxdiff.training.config import CLIPObjective
from jaxdiff.training.objectives import Learner, Metrics, Params

MAX_LOGIT_SCALE = math.log(100)  # section 2.5: a larger inverse temperature makes training unstable
FAR = -1e9  # a logit that no softmax notices


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


def similarities(
    model: CLIPModel, images: Float[Array, "b h w c"], ids: Int[Array, "b n"]
) -> Float[Array, "b b"]:
    """Cosines between pictures (rows) and captions, in float32."""
    return model.image_embeds(images) @ model.text_embeds(ids).T


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


def clip_learner(config: CLIPObjective, dtype: Dtype = jnp.float32) -> Learner:
    """CLIP's learner; batches have `image` (b, h, w, 3) in [-1, 1] and `ids` (b, n) int32."""
    sizes = (config.text, config.vision, config.projection_dim)
    template = abstract(CLIPModel, *sizes, dtype=dtype)

    def init(seed: int) -> Iterator[tuple[str, NDArray]]:
        for path, array in initial_weights(template, seed):
            scale = path == "logit_scale"
            yield path, np.full_like(array, math.log(config.logit_scale)) if scale else array

    def loss(
        params: Params, frozen: PyTree, batch: dict[str, Array], key: Key[Array, "..."]
    ) -> tuple[Array, Metrics]:
        cosines = similarities(with_params(template, params), batch["image"], batch["ids"])
        scale = jnp.exp(params["logit_scale"])
        scores = without_doubles(scale * cosines, same_caption(batch["ids"]))
        to_caption, to_picture = contrastive_loss(scores)
        parts = {
            "to_caption": to_caption,
            "to_picture": to_picture,
            "accuracy": retrieval(scores, 1)["retrieval"],
            "logit_scale": scale,
        }
        return 0.5 * (to_caption + to_picture), parts

    def limit(params: Params) -> Params:
        scale = jnp.minimum(params["logit_scale"], MAX_LOGIT_SCALE)
        return params | {"logit_scale": scale}

    return Learner(param_dict(template), init, loss, limit, rules=CLIP)
