"""What a text encoder is to a diffusion model, whatever its architecture."""

from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

from jaxdiff.core.errors import InputError
from jaxdiff.core.types import Array, Bool, Float, Int


class TextFeatures(NamedTuple):
    """What diffusion models take from a text encoder."""

    last: Float[Array, "b n d"]  # after the last layer that is not skipped and the final norm
    penultimate: Float[Array, "b n d"] | None = None  # one layer before, without the final norm
    # end of the text after all layers, projected if the model projects
    pooled: Float[Array, "b p"] | None = None
    mask: Bool[Array, "b n"] | None = None  # which tokens are text, not padding


def check_tokens(ids: Int[Array, "b n"], most: int) -> None:
    """InputError for texts of more tokens than a text encoder has positions for."""
    if ids.shape[1] > most:
        raise InputError(f"ids: got {ids.shape[1]} tokens, expected at most {most}")


@runtime_checkable
class TextModel(Protocol):
    """A text encoder, such as `CLIPTextModel`."""

    config: Any  # with `hidden_size` and, unless the family has a length, `max_position_embeddings`
    token_embedding: ClassVar[str]  # path of the weight that textual inversions extend

    def features(self, ids: Int[Array, "b n"], skip: int = 0) -> TextFeatures:
        """The features of token ids; the states are without `skip` layers at the end."""
        ...

    def unused_parameters(self, layer: str, pooled: bool) -> tuple[str, ...]:
        """Path prefixes of weights that neither the states of `layer` nor `pooled` depend on."""
        ...
