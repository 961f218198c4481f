"""Which parts make a pipeline that can be run here."""

from jaxdiff.checkpoints.pipelines import PipelineComponents
from jaxdiff.core.errors import InputError
from jaxdiff.core.validate import one_of
from jaxdiff.models.clip import CLIPTextModel
from jaxdiff.models.unet.module import UNet2DConditionModel
from jaxdiff.models.vae import AutoencoderKL

CLASSES = tuple(
    f"StableDiffusion{family}{task}Pipeline"
    for family in ("", "XL")
    for task in ("", "Img2Img", "Inpaint")
)
ENCODERS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}


def check_parts(parts: PipelineComponents, name: str) -> None:
    """InputError unless `parts` make a pipeline that can be run."""
    one_of(f"{name}: pipeline class", parts.class_name, CLASSES)
    encoders = [encoder for encoder in ENCODERS if encoder in parts.components] or ["text_encoder"]
    kinds = {"unet": UNet2DConditionModel, "vae": AutoencoderKL}
    for key, cls in (kinds | dict.fromkeys(encoders, CLIPTextModel)).items():
        module = parts.components[key].module if key in parts.components else None
        if not isinstance(module, cls):
            got = "none" if module is None else type(module).__name__
            raise InputError(f"{name}: {key}: got {got}, expected {cls.__name__}")
    for encoder in encoders:
        if ENCODERS[encoder] not in parts.tokenizers:
            raise InputError(f"{name}: {ENCODERS[encoder]}: got none, expected CLIPTokenizer")


def check_channels(unet: UNet2DConditionModel, vae: AutoencoderKL, name: str) -> None:
    """InputError unless the UNet is for the latents of the VAE, or for them and a mask's."""
    got, channels = unet.config.in_channels, vae.config.latent_channels
    if got not in (channels, 2 * channels + 1):
        raise InputError(
            f"{name}: unet: got in_channels {got}, "
            f"expected {channels}, or {2 * channels + 1} for inpainting"
        )
