"""How a network is called: as a pure function of its weights and its conditioning."""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from jaxdiff.core.errors import InputError
from jaxdiff.core.types import Array, Bool, Float, Int
from jaxdiff.models.build import with_params
from jaxdiff.parallel.sharding import Rules

CHANNELS = "channels"  # the conditioning that is concatenated to the noisy latents


@dataclasses.dataclass(frozen=True)
class NetworkAdapter(ABC):
    """How a network is called, in the pipeline, in trainings and in plans alike.

    Adapters of equal networks are equal: the weights of `module` do not count and are not read.
    """

    module: Any = dataclasses.field(compare=False, repr=False)
    prediction_type: str
    graph: Any = dataclasses.field(init=False, repr=False)

    sharding_rules: ClassVar[Rules]
    # what errors call a network whose attention no guidance rule can perturb; None: the module's
    # own `check_perturbed` says whether rules can
    unperturbable: ClassVar[str | None] = None
    # whether compilers give its operations more fast memory (`parallel.chips`): not those of a UNet
    is_transformer: ClassVar[bool] = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "graph", nnx.split(self.module)[0])

    def __call__(
        self,
        params: Mapping[str, Any],
        x: Float[Array, "b *space c"],
        t: Float[Array, "b"] | Int[Array, "b"],
        cond: Mapping[str, Array],
        *,
        perturbed: Bool[Array, "b"] | None = None,
        variance: bool = False,
    ) -> Float[Array, "b *space o"]:
        """The prediction for noisy latents x at times t, with weights by dotted path.

        Latents are images (b, h, w, c), or vectors (b, c) for networks that denoise embeddings.
        `cond` has arguments of the module by name, and may have `channels` (b, h, w, c) to
        concatenate to x. A learned variance, in as many channels behind those of the prediction, is
        left out unless `variance` asks for it. InputError for `perturbed` images where no rule can
        perturb attention.
        """
        arguments: dict[str, Any] = dict(cond)
        if CHANNELS in arguments:
            x = jnp.concatenate([x, arguments.pop(CHANNELS).astype(x.dtype)], axis=-1)
        if self.unperturbable is None:
            arguments["perturbed"] = perturbed
        if perturbed is not None:
            self.check_perturbed()
        output = with_params(self.module, params)(x, t, **arguments)
        return output if variance else output[..., : self.module.config.channels[1]]

    def check_perturbed(self) -> None:
        """InputError if guidance rules cannot perturb this network, as its call raises."""
        if self.unperturbable is None:
            self.module.check_perturbed()
        else:
            raise InputError(
                f"guidance: got perturbed attention for {self.unperturbable}, expected another rule"
            )

    @property
    def learns_variance(self) -> bool:
        """Whether the network learns the variance of a step, which a flow does not have."""
        learns = getattr(self.module.config, "learns_variance", False)
        return learns and self.prediction_type != "flow_prediction"

    @abstractmethod
    def conditioning_shapes(
        self, size: tuple[int, int], tokens: int
    ) -> dict[str, jax.ShapeDtypeStruct]:
        """The conditioning of one stream of one image, for latents of `size` and so many tokens."""
