"""What families ask of a model's components."""

from collections.abc import Mapping
from typing import Any, cast

from flax import nnx

from jaxdiff.core.errors import InputError
from jaxdiff.models.unet.config import UNet2DConditionConfig


def required_component(
    components: Mapping[str, nnx.Module], name: str, cls: Any, source: str
) -> nnx.Module:
    """The component of this name; InputError unless it is of the class, or one of the classes."""
    classes: tuple[type[nnx.Module], ...] = cls if isinstance(cls, tuple) else (cls,)
    module = components.get(name)
    if not isinstance(module, classes):
        got = "none" if module is None else type(module).__name__
        expected = " or ".join(each.__name__ for each in classes)
        raise InputError(f"{source}: {name}: got {got}, expected {expected}")
    return cast(nnx.Module, module)


def check_latent_channels(got: int, channels: int, *, name: str, source: str) -> None:
    """InputError unless the network `name` takes latents of as many channels as the codec has."""
    if got != channels:
        raise InputError(
            f"{source}: {name}: got in_channels {got}, expected {channels} as the latents have"
        )


def has_mask_channels(unet: UNet2DConditionConfig, channels: int, *, source: str) -> bool:
    """Whether the UNet takes a mask and masked latents beside the noisy ones, of `channels`.

    InputError for other channels, which are neither theirs nor those of a hint.
    """
    plain = channels + unet.hint_channels
    masked = None if unet.hint_channels else 2 * channels + 1
    if unet.in_channels not in (plain, masked):
        inpainting = "" if masked is None else f", or {masked} for inpainting"
        raise InputError(
            f"{source}: unet: got in_channels {unet.in_channels}, expected {plain}{inpainting}"
        )
    return unet.in_channels == masked


def check_context_width(
    encoder: nnx.Module, width: int | None, *, network: str, source: str
) -> None:
    """InputError unless the text encoder's hidden states are as wide as `network` takes them."""
    got = cast(Any, encoder).config.hidden_size
    if got != width:
        raise InputError(
            f"{source}: text_encoder: got hidden states of width {got}, expected {width}, as the "
            f"{network} has"
        )
