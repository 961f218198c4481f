"""Components that single files of several families have: T5, CLIP and VAEs of 16 channels."""

import functools

import numpy as np

from jaxdiff.checkpoints import infer_config, ldm_reader, ldm_writer, leftovers
from jaxdiff.checkpoints.clip_vocabulary import END
from jaxdiff.checkpoints.key_aliases import canonical
from jaxdiff.checkpoints.prediction_type import FLOW
from jaxdiff.checkpoints.safetensors import LazyTensor, TensorInfo, identity_matrix
from jaxdiff.checkpoints.single_file_layouts import (
    UNET,
    VAES,
    Entries,
    FileComponent,
    Tensors,
    first_prefix,
)
from jaxdiff.core.errors import InputError

T5, CLIP_L, CLIP_G = (
    f"text_encoders.{name}.transformer." for name in ("t5xxl", "clip_l", "clip_g")
)
PREFIXES = (UNET, "")  # of a transformer; files with nothing else have none
PROJECTION = "text_projection.weight"
EMBEDDING, TIED = "shared.weight", "encoder.embed_tokens.weight"  # one table under two names

UNET_PART = FileComponent(
    name="unet",
    class_name="UNet2DConditionModel",
    prefix=UNET,
    config=infer_config.unet_fields,
    read=ldm_reader.unet_from_ldm,
    write=ldm_writer.unet_to_ldm,
)


def flow_scheduler(shift: float, *, dynamic: bool = False) -> dict:
    """The scheduler_config.json of a flow; `dynamic` shifts by the number of tokens, as FLUX.1."""
    config = {"_class_name": FLOW, "num_train_timesteps": 1000, "shift": shift}
    config["use_dynamic_shifting"] = dynamic
    if dynamic:
        config |= {"base_shift": 0.5, "max_shift": 1.15}
        config |= {"base_image_seq_len": 256, "max_image_seq_len": 4096}
    return config


def prefix_with(entries: Entries, names: tuple[str, ...]) -> str | None:
    """The prefix below which a file has all these tensors; None if it has not."""
    found = (p for p in PREFIXES if all(f"{p}{name}" in entries for name in names))
    return next(found, None)


def vae(entries: Entries) -> FileComponent:
    """A VAE in the names of the original code, below one of two prefixes."""
    return FileComponent(
        name="vae",
        class_name="AutoencoderKL",
        prefix=first_prefix(entries, VAES),
        config=infer_config.vae_fields,
        read=ldm_reader.vae_from_ldm,
        write=ldm_writer.vae_to_ldm,
    )


def t5(number: str, *, optional: bool = False) -> FileComponent:
    """T5's encoder as text encoder `number`; its tokenizer is in no file."""
    return FileComponent(
        name=f"text_encoder{number}",
        class_name="T5EncoderModel",
        prefix=T5,
        config=infer_config.t5_fields,
        read=t5_from_file,
        tokenizer=f"tokenizer{number}",
        optional=optional,
        width="joint_attention_dim",
    )


def t5_from_file(entries: Entries) -> dict[str, TensorInfo]:
    """T5's tensors, with the table of embeddings under the one name that it has in a folder."""
    found = dict(entries)
    if (tied := found.pop(TIED, None)) is not None:
        found.setdefault(EMBEDDING, tied)
    return found


def clip_l(*, projects: bool) -> FileComponent:
    """CLIP-L in transformers' names.

    Where it `projects`, in Stable Diffusion 3, its projection is the identity: the models take the
    pooled embedding as it is, though files may have the projection of CLIP.
    """
    name = "CLIPTextModelWithProjection" if projects else "CLIPTextModel"
    return FileComponent(
        name="text_encoder",
        class_name=name,
        prefix=CLIP_L,
        config=infer_config.clip_text_fields,
        read=functools.partial(clip, class_name=name, identity=projects),
        write=_without_identity if projects else dict,
        unused=leftovers.PROJECTION,
        tokenizer="tokenizer",
        pad=END,
        width="pooled_projection_dim",
    )


def clip_g() -> FileComponent:
    """OpenCLIP bigG in the names of transformers."""
    name = "CLIPTextModelWithProjection"
    return FileComponent(
        name="text_encoder_2",
        class_name=name,
        prefix=CLIP_G,
        config=infer_config.clip_text_fields,
        read=functools.partial(clip, class_name=name),
        tokenizer="tokenizer_2",
        pad="!",
        width="pooled_projection_dim",
    )


def clip(entries: Entries, *, class_name: str, identity: bool = False) -> dict[str, TensorInfo]:
    """CLIP's tensors by the names of today's transformers; `identity` projects by no matrix."""
    names = {name: canonical(name, class_name=class_name) for name in entries}
    found = {new: entries[name] for name, new in names.items() if new is not None}
    norm = found.get("text_model.final_layer_norm.weight")
    if identity and norm is not None:
        found[PROJECTION] = identity_matrix(norm.path, PROJECTION, norm.shape[0])
    return found


def _without_identity(tensors: Tensors) -> dict[str, LazyTensor]:
    """The tensors without a projection, which must be the identity; else InputError."""
    values = tensors[PROJECTION].fetch()
    if not np.array_equal(values, np.identity(len(values))):
        raise InputError(
            f"text_encoder: {PROJECTION}: got another matrix, expected the identity: a single "
            "file of Stable Diffusion 3 has no other"
        )
    return {name: tensor for name, tensor in tensors.items() if name != PROJECTION}
