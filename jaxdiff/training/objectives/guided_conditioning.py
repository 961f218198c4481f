"""The conditioning of both streams of classifier-free guidance, with captions and without."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxdiff.core.types import Array, Int
from jaxdiff.training.objectives.diffusion import LatentDiffusion


def uncond_and_cond(
    model: LatentDiffusion,
    encoders: Mapping[str, Any],
    null: Mapping[str, Int[Array, "_"]],
    batch: Mapping[str, Array],
) -> tuple[dict[str, Array], dict[str, Array]]:
    """The conditioning of the null caption, whose token ids are `null`, and of those of a batch."""
    columns = model.family.id_columns
    cond = model.encode_captions(encoders, [batch[column] for column in columns.values()])
    uncond = model.encode_captions(encoders, [null[name][None] for name in columns])
    uncond = jax.tree.map(lambda row, rows: jnp.broadcast_to(row, rows.shape), uncond, cond)
    b = len(jax.tree.leaves(batch)[0])
    none, every = ([jnp.full(b, dropped)] * max(len(cond), 1) for dropped in (False, True))
    return model.conditioning(uncond, every, batch), model.conditioning(cond, none, batch)
