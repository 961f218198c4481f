"""What a Stable Diffusion is: UNets with other families' conditioning are refused."""

import pytest

from jaxdiff.core.errors import InputError
from jaxdiff.families import stable_diffusion
from jaxdiff.models.autoencoder_tiny import AutoencoderTiny, AutoencoderTinyConfig
from jaxdiff.models.build import abstract
from jaxdiff.models.clip import CLIPTextModel
from jaxdiff.models.clip_config import CLIPTextConfig
from jaxdiff.models.unet.config import UNet2DConditionConfig
from jaxdiff.models.unet.module import UNet2DConditionModel
from jaxdiff.models.unet.unet_2d import UNet2DModel
from jaxdiff.models.unet.unet_2d_config import UNet2DConfig

UNET = {
    "block_out_channels": (8, 16),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "norm_num_groups": 4,
    "cross_attention_dim": 6,
    "attention_head_dim": 2,
    "layers_per_block": 1,
}
TEXT = CLIPTextConfig(
    vocab_size=9, hidden_size=6, intermediate_size=8, num_attention_heads=2, num_hidden_layers=1
)


def detect(unet):
    parts = {
        "unet": unet,
        "vae": abstract(AutoencoderTiny, AutoencoderTinyConfig()),
        "text_encoder": abstract(CLIPTextModel, TEXT),
    }
    return stable_diffusion.detect(parts, {}, source="here")


def test_conditioning_of_text_alone():
    unet = abstract(UNet2DConditionModel, UNet2DConditionConfig(**UNET))
    assert detect(unet).name == stable_diffusion.SD.name


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_class_embeds": 9}, "UNet: got num_class_embeds 9, expected that of Stable Diff"),
        ({"class_embed_type": "timestep"}, "UNet: got class_embed_type timestep"),
        ({"encoder_hid_dim": 5}, "UNet: got context_projection text_proj"),
        (
            {"addition_embed_type": "text", "addition_embed_type_num_heads": 2},
            "UNet: got addition_embed_type text",
        ),
    ],
)
def test_other_conditioning_is_refused(fields, message):
    unet = abstract(UNet2DConditionModel, UNet2DConditionConfig(**UNET | fields))
    with pytest.raises(InputError, match=message):
        detect(unet)


def test_a_unet_without_text_is_refused():
    config = UNet2DConfig(
        block_out_channels=(8,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        norm_num_groups=4,
    )
    with pytest.raises(InputError, match="unet: got UNet2DModel, expected UNet2DConditionModel"):
        detect(abstract(UNet2DModel, config))
