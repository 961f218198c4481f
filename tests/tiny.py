"""A tiny text-to-image model with random weights, as a pipeline folder on disk."""

import dataclasses
import functools
import pathlib
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import originals

from jaxdiff.checkpoints.components import Component
from jaxdiff.checkpoints.key_mapping import path_to_torch_key, torch_shape
from jaxdiff.checkpoints.loading import lazy_tensors
from jaxdiff.checkpoints.pipelines import PipelineComponents, read_pipeline, write_pipeline
from jaxdiff.checkpoints.tokenizers import read_tokenizer
from jaxdiff.data.trained_tokenizer import save_tokenizer, train_tokenizer
from jaxdiff.models.autoencoder_tiny import AutoencoderTiny, AutoencoderTinyConfig
from jaxdiff.models.build import abstract, param_dict, with_params
from jaxdiff.models.clip import CLIPTextModel
from jaxdiff.models.clip_config import CLIPTextConfig
from jaxdiff.models.unet.config import UNet2DConditionConfig
from jaxdiff.models.unet.module import UNet2DConditionModel
from jaxdiff.models.vae import AutoencoderKL, AutoencoderKLConfig
from jaxdiff.nn.layers import LayerFactory
from jaxdiff.parallel.mesh import replicate
from jaxdiff.parallel.sharding import infer_shardings
from jaxdiff.pipeline.pipeline import Pipeline

CAPTIONS = ["a small red circle", "a large blue star above a green square"]
SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
    "num_train_timesteps": 1000,
    "clip_sample": False,
    "steps_offset": 1,
    "timestep_spacing": "leading",
}
DEFAULTS = {"guidance_scale": 3.0, "steps": 4, "sampler": "ddim"}


def random_component(cls, *configs, seed=0, **options):
    """A component whose weights are random but of the size that keeps activations near 1."""
    module = abstract(cls, *configs, **options)
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        fan_in = max(1, leaf.size // leaf.shape[-1])
        centre = 1.0 if path.endswith("scale") else 0.0
        return jnp.asarray(centre + rng.normal(size=leaf.shape) * fan_in**-0.5, leaf.dtype)

    values = {path: draw(path, leaf) for path, leaf in param_dict(module).items()}
    return Component(module=with_params(module, values))


class LinearUNet(UNet2DConditionModel):
    """Stands in where only what is around a network is tested: a tenth of the time to compile.

    Linear in the sample and in the mean of the context, which counts for nothing where `perturbed`.
    """

    def __init__(self, config, *, rngs=None, **options):
        layers = LayerFactory(rngs=rngs, **options)
        self.config, self.dtype = config, layers.dtype
        self.context = layers.linear(config.cross_attention_dim, config.out_channels)
        self.conv_out = layers.conv(config.in_channels, config.out_channels, 1)

    def check_perturbed(self):
        """Always possible."""

    def __call__(self, sample, timesteps, context=None, *, perturbed=None, **added):
        told = self.context(jnp.mean(context, axis=1)) + jnp.sin(timesteps / 300)[:, None]
        if perturbed is not None:
            told = jnp.where(perturbed[:, None], 0, told)
        return self.conv_out(sample) + told[:, None, None, :]


def write_xl(folder: pathlib.Path, zeros=True, **unet) -> pathlib.Path:
    """A model with two text encoders that is told sizes, like SDXL; pictures as `write_tiny`'s.

    `zeros` is whether it draws with zeros for a negative prompt that was not given.
    """
    plain = read_pipeline(write_tiny(folder, **unet))
    first = plain.components["text_encoder"].module.config
    end = first.vocab_size - 1  # whose state is told
    second = dataclasses.replace(first, hidden_size=12, projection_dim=10, eos_token_id=end)
    told = dataclasses.replace(
        plain.components["unet"].module.config,
        cross_attention_dim=8 + 12,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=10 + 6 * 4,
        use_linear_projection=True,
    )
    more = {
        "unet": random_component(UNet2DConditionModel, told, seed=4),
        "text_encoder_2": random_component(CLIPTextModel, second, with_projection=True, seed=5),
    }
    files = plain.tokenizers["tokenizer"]
    parts = dataclasses.replace(
        plain,
        class_name="StableDiffusionXLPipeline",
        components={**plain.components, **more},
        tokenizers={"tokenizer": files, "tokenizer_2": files},
        scheduler=SCHEDULER | {"prediction_type": "epsilon"},
        options={"force_zeros_for_empty_prompt": zeros},
        absent=(),
    )
    write_pipeline(folder, parts)
    return folder


def write_tiny(folder: pathlib.Path, defaults=DEFAULTS, **unet) -> pathlib.Path:
    """Write the model into `folder`: 16x16 pictures from 8x8x4 latents; `unet` has other fields."""
    write_pipeline(folder, dataclasses.replace(_parts(**unet), defaults=defaults))
    return folder


@functools.cache
def _parts(**unet) -> PipelineComponents:
    tokenizer = train_tokenizer(CAPTIONS, vocab_size=560, max_length=12)
    with tempfile.TemporaryDirectory() as folder:
        save_tokenizer(tokenizer, pathlib.Path(folder))
        files = read_tokenizer(pathlib.Path(folder))
    fields = {
        "sample_size": 8,
        "down_block_types": ("DownBlock2D",),  # attention is in the middle: once is enough
        "up_block_types": ("UpBlock2D",),
        "block_out_channels": (8,),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "cross_attention_dim": 8,
        "attention_head_dim": 2,
    }
    vae = AutoencoderKLConfig(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        scaling_factor=0.7,
        mid_block_add_attention=False,
    )
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=8,
        intermediate_size=16,
        projection_dim=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=12,
    )
    return PipelineComponents(
        components={
            "unet": random_component(
                UNet2DConditionModel, UNet2DConditionConfig(**fields | unet), seed=1
            ),
            "vae": random_component(AutoencoderKL, vae, seed=2),
            "text_encoder": random_component(CLIPTextModel, text, seed=3),
        },
        scheduler=SCHEDULER,
        tokenizers={"tokenizer": files},
    )


TAESD = AutoencoderTinyConfig(
    encoder_block_out_channels=(8, 8),
    decoder_block_out_channels=(8, 8),
    num_encoder_blocks=(1, 2),
    num_decoder_blocks=(2, 1),
)


def taesd_halves() -> tuple[dict, dict]:
    """The tensors of a random TAESD's encoder and decoder, with the numbers of its own code."""
    halves = {"encoder": {}, "decoder": {}}
    for name, tensor in lazy_tensors(random_component(AutoencoderTiny, TAESD).module).items():
        half, number, leaf = name.replace(".layers.", ".").split(".", 2)
        halves[half][f"{int(number) + (half == 'decoder')}.{leaf}"] = tensor.fetch()
    return halves["encoder"], halves["decoder"]


def write_vaes(folder: pathlib.Path, checkpoint: dict) -> None:
    """A VAE file with that of a single file's tensors, and TAESD as one file and as two."""
    prefix = "first_stage_model."
    vae = {k.removeprefix(prefix): v for k, v in checkpoint.items() if k.startswith(prefix)}
    originals.write_safetensors(folder / "vae.safetensors", vae)
    stored = lazy_tensors(random_component(AutoencoderTiny, TAESD).module)
    stored = {name: tensor.fetch() for name, tensor in stored.items()}
    originals.write_safetensors(folder / "taesd.safetensors", stored)
    for name, half in zip(("encoder", "decoder"), taesd_halves(), strict=True):
        originals.write_safetensors(folder / f"taesd_{name}.safetensors", half)


def first_devices(pipe, count):
    """The same model on the first `count` devices only."""

    devices = jax.local_devices()[:count]
    components = {
        name: Component(module=replicate(part.module, devices), config=part.config)
        for name, part in pipe.parts.components.items()
    }

    parts = dataclasses.replace(pipe.parts, components=components)
    return Pipeline(parts, name=pipe.name, devices=devices)


def with_linear_unet(pipe, seed=1):
    """The same model on the same devices, with a linear network for its UNet."""
    types = dict.fromkeys(("dtype", "param_dtype"), pipe.unet.dtype)
    unet = random_component(LinearUNet, pipe.unet.config, seed=seed, **types)
    if pipe.mesh is not None:
        table = param_dict(unet.module)
        placed = jax.device_put(table, infer_shardings(table, pipe.mesh))
        unet = Component(module=with_params(unet.module, placed))
    parts = dataclasses.replace(pipe.parts, components=pipe.parts.components | {"unet": unet})
    return Pipeline(
        parts, name=pipe.name, devices=pipe.devices, mesh=pipe.mesh, offload=pipe.offload
    )


def write_lora(pipe, path, seed):
    """A LoRA for every matrix and kernel of the UNet, in kohya's spelling."""
    rng, tensors = np.random.default_rng(seed), {}
    for key, array in param_dict(pipe.unet).items():
        if key.endswith(".kernel"):
            shape = torch_shape(array.shape, key)
            stem = "lora_unet_" + path_to_torch_key(key).removesuffix(".weight").replace(".", "_")
            tail = (1,) * (len(shape) - 2)
            values = rng.normal(size=(2, *shape[1:])), 0.1 * rng.normal(size=(shape[0], 2, *tail))
            for role, value in zip(("down", "up"), values, strict=True):
                tensors[f"{stem}.lora_{role}.weight"] = value.astype(np.float32)
    return originals.write_safetensors(path, tensors)
