"""A UNet that attends to the embedding of a class: the class-conditional LDM (2112.10752).

The original model has its table of classes beside the UNet; here they are one network.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from jaxdiff.core.errors import InputError
from jaxdiff.core.types import Array, Bool, Dtype, Float, Int
from jaxdiff.core.validate import positive
from jaxdiff.models.unet.adapter import UNetAdapter
from jaxdiff.models.unet.config import UNet2DConditionConfig
from jaxdiff.models.unet.module import UNet2DConditionModel
from jaxdiff.nn.embeddings import LabelEmbedding
from jaxdiff.nn.layers import LayerFactory


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClassConditionalUNet2DConfig(UNet2DConditionConfig):
    """The fields of UNet2DConditionModel, and the number of classes.

    InputError for a UNet that takes more than one context.
    """

    num_classes: int = 1000  # the label after the last one is no class

    def __post_init__(self) -> None:
        """Refuse what ClassConditionalUNet2DModel cannot do."""
        super().__post_init__()
        positive("num_classes", self.num_classes)
        if not self.has_context or not isinstance(self.cross_attention_dim, int):
            raise InputError(
                f"cross_attention_dim: got {self.cross_attention_dim}, expected the width of the "
                "embedding of a class, and blocks that attend to it"
            )
        for name in (
            "addition_embed_type",
            "class_embed_type",
            "encoder_hid_dim",
            "num_class_embeds",
            "time_cond_proj_dim",
        ):
            if getattr(self, name) is not None:
                raise InputError(f"{name}: got {getattr(self, name)}, expected null with classes")


class ClassConditionalUNet2DModel(UNet2DConditionModel):
    """A UNet whose context is one token, the embedding of a class."""

    def __init__(
        self,
        config: ClassConditionalUNet2DConfig,
        *,
        dtype: Dtype = jnp.float32,
        param_dtype: Dtype = jnp.float32,
        attention: str = "auto",
        remat: str = "none",
        rngs: nnx.Rngs | None,
    ):
        super().__init__(
            config,
            dtype=dtype,
            param_dtype=param_dtype,
            attention=attention,
            remat=remat,
            rngs=rngs,
        )
        layers = LayerFactory(rngs=rngs, dtype=dtype, param_dtype=param_dtype)
        width = config.per_block("cross_attention_dim")[0]
        self.class_embedder = LabelEmbedding(config.num_classes, width, layers=layers)

    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        sample: Float[Array, "b h w c"],
        timesteps: Float[Array, "b"] | Int[Array, "b"],
        class_labels: Int[Array, "b"],
        *,
        perturbed: Bool[Array, "b"] | None = None,
    ) -> Float[Array, "b h w o"]:
        """The network's output for noisy latents, in the dtype of `sample`.

        `timesteps` count the steps of the training schedule; the class label `config.num_classes`
        is no class. Where `perturbed`, self-attention in the middle block is off (2403.17377).
        """
        context = self.class_embedder(class_labels)[:, None]
        return super().__call__(sample, timesteps, context, perturbed=perturbed)


class ClassConditionalUNetAdapter(UNetAdapter):
    """How a class-conditional UNet is called."""

    def conditioning_shapes(
        self, size: tuple[int, int], tokens: int
    ) -> dict[str, jax.ShapeDtypeStruct]:
        """The conditioning of one stream of one image: its class."""
        del size, tokens
        return {"class_labels": jax.ShapeDtypeStruct((), jnp.int32)}
