"""The parts of SD3Transformer2DModel, with diffusers' parameter names."""

from flax import nnx

from jaxdiff.core.types import Array, Float, Int
from jaxdiff.models.sd3.config import SD3Transformer2DConfig
from jaxdiff.nn.embeddings import TimestepEmbedding, sinusoidal
from jaxdiff.nn.joint_attention import JointAttention, SelfAttention
from jaxdiff.nn.layers import LayerFactory
from jaxdiff.nn.modulation import (
    AdaLayerNormContinuous,
    AdaLayerNormZero,
    gated,
    modulated_norm,
)
from jaxdiff.nn.remat import remat
from jaxdiff.nn.transformer import FeedForward

TIME_WIDTH = 256  # of the sines and cosines of the time
ACT = "gelu-approximate"  # of the perceptrons

Tokens = Float[Array, "b n d"]
Context = Float[Array, "b m d"]
Vector = Float[Array, "b d"]


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


class JointTransformerBlock(nnx.Module):
    """A block of MMDiT (2403.03206, figure 2b): joint attention, then a perceptron of each stream.

    With `dual` image tokens also attend to one another in a second attention (MMDiT-X of Stable
    Diffusion 3.5 medium). The `last` block has no output for the text tokens.
    """

    def __init__(
        self, config: SD3Transformer2DConfig, *, layers: LayerFactory, dual: bool, last: bool
    ):
        width, heads = config.width, config.num_attention_heads
        qk_norm = config.qk_norm is not None
        self.norm1 = AdaLayerNormZero(width, layers=layers, chunks=9 if dual else 6)
        self.norm1_context = (
            AdaLayerNormContinuous(width, width, layers=layers)
            if last
            else AdaLayerNormZero(width, layers=layers)
        )
        self.attn = JointAttention(
            width, layers=layers, heads=heads, qk_norm=qk_norm, context_output=not last
        )
        self.attn2 = (
            SelfAttention(width, layers=layers, heads=heads, qk_norm=qk_norm) if dual else None
        )
        self.ff = FeedForward(width, layers=layers, act=ACT)
        self.ff_context = None if last else FeedForward(width, layers=layers, act=ACT)
        self.remat = layers.remat

    @remat
    def __call__(self, x: Tokens, context: Context, vector: Vector) -> tuple[Tokens, Context]:
        """The tokens of both streams; those of the text unchanged by the last block."""
        normed, (gate, *ff) = self.norm1(x, vector)
        normed_context, context_vectors = self._normed_context(context, vector)
        attended, attended_context = self.attn(normed, normed_context)
        out = x + gated(attended, gate)
        if self.attn2 is not None:
            *ff, shift, scale, gate = ff
            out = out + gated(self.attn2(modulated_norm(x, shift, scale)), gate)
        out = _with_perceptron(self.ff, out, *ff)
        if self.ff_context is None or attended_context is None:
            return out, context
        gate, *ff = context_vectors
        context = context + gated(attended_context, gate)
        return out, _with_perceptron(self.ff_context, context, *ff)

    def _normed_context(
        self, context: Context, vector: Vector
    ) -> tuple[Context, tuple[Vector, ...]]:
        if isinstance(self.norm1_context, AdaLayerNormContinuous):
            return self.norm1_context(context, vector), ()
        return self.norm1_context(context, vector)


def _with_perceptron(
    perceptron: FeedForward, x: Tokens, shift: Vector, scale: Vector, gate: Vector
) -> Tokens:
    return x + gated(perceptron(modulated_norm(x, shift, scale)), gate)
