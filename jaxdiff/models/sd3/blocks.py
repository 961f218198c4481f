"""The parts of SD3Transformer2DModel, with diffusers' parameter names."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from jaxdiff.core.errors import InputError
from jaxdiff.core.types import Array, Float, Int
from jaxdiff.models.sd3.config import SD3Transformer2DConfig
from jaxdiff.nn.embeddings import TimestepEmbedding, sinusoidal
from jaxdiff.nn.initializers import ZEROS, SincosGrid
from jaxdiff.nn.joint_attention import JointAttention, SelfAttention
from jaxdiff.nn.layers import LayerFactory, Placeholder
from jaxdiff.nn.norms import layer_norm
from jaxdiff.nn.remat import remat

EPS = 1e-6  # of layer norms; diffusers fixes it in code, not in the config
TIME_WIDTH = 256  # of the sines and cosines of the time

Tokens = Float[Array, "b n d"]
Vector = Float[Array, "b d"]


class PatchEmbed(nnx.Module):
    """Patches of latents as tokens, with the positions of a grid, of which the middle is taken.

    The positions are stored with the weights. They are never trained: their gradient is zero.
    """

    def __init__(self, config: SD3Transformer2DConfig, *, layers: LayerFactory):
        patch, side = config.patch_size, config.pos_embed_max_size
        no_padding = ((0, 0), (0, 0))
        self.proj = layers.conv(
            config.in_channels, config.width, patch, stride=patch, padding=no_padding
        )
        positions = SincosGrid(config.sample_size // patch)
        self.pos_embed = layers.param(positions, (1, side * side, config.width))
        self.patch, self.side = patch, side

    def __call__(self, sample: Float[Array, "b h w c"]) -> Tokens:
        """One token for each patch, row by row; InputError for a size that does not fit."""
        for name, length in zip(("height", "width"), sample.shape[1:3], strict=True):
            largest = self.side * self.patch
            if length % self.patch or length > largest:
                raise InputError(
                    f"{name} of the latents: got {length}, "
                    f"expected a multiple of {self.patch} up to {largest}"
                )
        patches = self.proj(sample)
        tokens = patches.reshape(len(patches), -1, patches.shape[-1])
        return tokens + self._positions(*patches.shape[1:3]).astype(tokens.dtype)

    def _positions(self, rows: int, columns: int) -> Float[Array, "1 n d"]:
        """The middle of the grid."""
        grid = lax.stop_gradient(self.pos_embed[...]).reshape(self.side, self.side, -1)
        top, left = (self.side - rows) // 2, (self.side - columns) // 2
        return grid[top : top + rows, left : left + columns].reshape(1, rows * columns, -1)


def unpatchify(
    tokens: Float[Array, "b n o"], size: tuple[int, int], patch: int
) -> Float[Array, "b h w c"]:
    """Latents of `size` of tokens that hold patch x patch x channels numbers each."""
    rows, columns = (side // patch for side in size)
    grid = tokens.reshape(len(tokens), rows, columns, patch, patch, -1)
    return grid.swapaxes(2, 3).reshape(len(tokens), *size, -1)


class TimeTextEmbedding(nnx.Module):
    """The vector that modulates all blocks: an embedding of the time and of the pooled text."""

    def __init__(self, config: SD3Transformer2DConfig, *, layers: LayerFactory):
        width = config.width
        self.timestep_embedder = TimestepEmbedding(TIME_WIDTH, width, layers=layers)
        self.text_embedder = TimestepEmbedding(config.pooled_projection_dim, width, layers=layers)

    def __call__(
        self, timesteps: Float[Array, "b"] | Int[Array, "b"], pooled: Float[Array, "b p"]
    ) -> Vector:
        """The sum of both, in the compute dtype."""
        time = self.timestep_embedder(sinusoidal(timesteps, TIME_WIDTH))
        return time + self.text_embedder(pooled)


class Modulation(nnx.Module):
    """`count` vectors for shifts, scales and gates of tokens: a linear layer of silu(embedding).

    All are zero at first, so that with gates a block is the identity (adaLN-Zero, 2212.09748).
    """

    def __init__(self, width: int, count: int, *, layers: LayerFactory):
        self.linear = layers.linear(width, count * width, init=ZEROS)
        self.count = count

    def __call__(self, embedding: Vector) -> tuple[Float[Array, "b 1 d"], ...]:
        """The vectors, which broadcast along tokens."""
        vectors = self.linear(jax.nn.silu(embedding))[:, None]
        return tuple(jnp.split(vectors, self.count, axis=-1))


def norm(x: Tokens) -> Float[Array, "b n d"]:
    """Layer norm without weights, in float32."""
    width = x.shape[-1]
    return layer_norm(x, jnp.ones(width), jnp.zeros(width), EPS)


def modulate(
    normed: Float[Array, "b n d"],
    shift: Float[Array, "b 1 d"],
    scale: Float[Array, "b 1 d"],
) -> Tokens:
    """normed (1 + scale) + shift in float32, returned in the dtype of `shift`."""
    out = normed * (1 + scale.astype(jnp.float32)) + shift.astype(jnp.float32)
    return out.astype(shift.dtype)


class FeedForward(nnx.Module):
    """Two linear layers, four times as wide inside, with the tanh form of GELU between them."""

    def __init__(self, width: int, *, layers: LayerFactory):
        self.net = nnx.List(
            [
                _Projection(width, 4 * width, layers=layers),
                Placeholder(),
                layers.linear(4 * width, width),
            ]
        )

    def __call__(self, x: Tokens) -> Tokens:
        """Apply the perceptron; no residual is added."""
        return self.net[2](jax.nn.gelu(self.net[0].proj(x), approximate=True))


class _Projection(nnx.Module):
    def __init__(self, n_in: int, n_out: int, *, layers: LayerFactory):
        self.proj = layers.linear(n_in, n_out)


class JointTransformerBlock(nnx.Module):
    """A block of MMDiT (2403.03206, figure 2b): joint attention, then two perceptrons.

    With `dual` image tokens also attend to one another in a second attention (MMDiT-X of Stable
    Diffusion 3.5 medium). The `last` block has no output for the text tokens.
    """

    def __init__(
        self, config: SD3Transformer2DConfig, *, layers: LayerFactory, dual: bool, last: bool
    ):
        width, heads = config.width, config.num_attention_heads
        shared = {"layers": layers, "heads": heads, "qk_norm": config.qk_norm is not None}
        self.norm1 = Modulation(width, 9 if dual else 6, layers=layers)
        self.norm1_context = Modulation(width, 2 if last else 6, layers=layers)
        self.attn = JointAttention(width, **shared, context_output=not last)
        self.attn2 = SelfAttention(width, **shared) if dual else None
        self.ff = FeedForward(width, layers=layers)
        self.ff_context = None if last else FeedForward(width, layers=layers)
        self.remat = layers.remat

    @remat
    def __call__(
        self, x: Tokens, context: Float[Array, "b m d"], embedding: Vector
    ) -> tuple[Float[Array, "b n d"], Float[Array, "b m d"]]:
        """The tokens of both streams; those of the text unchanged by the last block."""
        shift, scale, gate, shift_ff, scale_ff, gate_ff, *second = self.norm1(embedding)
        normed = norm(x)
        modulation = self.norm1_context(embedding)
        attended, attended_context = self.attn(
            modulate(normed, shift, scale), self._modulated_context(context, modulation)
        )
        x = x + gate * attended
        if self.attn2 is not None:
            shift_2, scale_2, gate_2 = second
            x = x + gate_2 * self.attn2(modulate(normed, shift_2, scale_2))
        x = x + gate_ff * self.ff(modulate(norm(x), shift_ff, scale_ff))
        if self.ff_context is None or attended_context is None:
            return x, context
        _, _, gate, shift_ff, scale_ff, gate_ff = modulation
        context = context + gate * attended_context
        normed = modulate(norm(context), shift_ff, scale_ff)
        return x, context + gate_ff * self.ff_context(normed)

    def _modulated_context(
        self, context: Float[Array, "b m d"], modulation: tuple[Float[Array, "b 1 d"], ...]
    ) -> Float[Array, "b m d"]:
        # The last block's is a norm like that of the output, whose scale comes first.
        shift, scale = modulation[:2] if self.ff_context is not None else modulation[1::-1]
        return modulate(norm(context), shift, scale)
