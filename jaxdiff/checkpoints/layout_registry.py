"""The layouts of single files of all families, and which of them a file or a pipeline has."""

from collections.abc import Iterable, Mapping
from types import ModuleType
from typing import Any

from jaxdiff.checkpoints import (
    layout_dit,
    layout_flux,
    layout_glide,
    layout_ldm,
    layout_sd3,
    layout_stable_diffusion,
)
from jaxdiff.checkpoints.file_kinds import (
    is_shard,
    is_vae_alone,
    text_encoder_alone,
    unsupported_family,
)
from jaxdiff.checkpoints.single_file_layouts import (
    Entries,
    SingleFileLayout,
    source_of,
)
from jaxdiff.core.errors import InputError

# Files with `PIPELINES`, the classes that are written in their layouts; `detect`, which has the
# layout of a file or None; and `layout_for`, which has that of a pipeline. The first that fits.
LAYOUT_MODULES: tuple[ModuleType, ...] = (
    layout_ldm,
    layout_stable_diffusion,
    layout_sd3,
    layout_flux,
    layout_dit,
    layout_glide,
)
EXPECTED = (
    "Stable Diffusion 1, 2, XL, 3 or 3.5, FLUX.1, Chroma, DiT, SiT, latent diffusion or GLIDE"
)


def layout_of(entries: Entries, prediction_type: str | None = None) -> SingleFileLayout:
    """The layout of a single file; InputError if it is none of them.

    `prediction_type` is what the user asks for, or the file says.
    """
    source = source_of(entries)
    if is_shard(source):
        raise InputError(
            f"{source}: got one of several files of a component, expected the folder of the whole "
            "model (with model_index.json), or a single file with all tensors"
        )
    if family := unsupported_family(entries):
        raise InputError(f"{source}: got {family}, which is not supported, expected {EXPECTED}")
    for module in LAYOUT_MODULES:
        if (layout := module.detect(entries, prediction_type)) is not None:
            return layout
    if is_vae_alone(entries):
        raise InputError(
            f"{source}: got a VAE, expected a whole checkpoint, to which this VAE can be given "
            "(--vae FILE, vae=...)"
        )
    if kind := text_encoder_alone(entries):
        raise InputError(
            f"{source}: got a text encoder ({kind}), expected a file with a network, to which this "
            "text encoder can be given (--text-encoders FILE ..., text_encoders=...)"
        )
    raise InputError(f"{source}: got {_some(entries)}, expected a checkpoint of {EXPECTED}")


def is_model(entries: Entries) -> bool:
    """Whether the file has the network of a family that is loaded from files."""
    if unsupported_family(entries) is not None:
        return False
    return any(module.detect(entries) is not None for module in LAYOUT_MODULES)


def layout_for(
    class_name: str, configs: Mapping[str, Any], scheduler: Mapping[str, Any]
) -> SingleFileLayout:
    """The layout that a pipeline is written in, by its class, `configs` of components and schedule.

    Raises InputError for what no single file can hold.
    """
    for module in LAYOUT_MODULES:
        if class_name in module.PIPELINES:
            return module.layout_for(class_name, configs, scheduler)
    known = sorted({name for module in LAYOUT_MODULES for name in module.PIPELINES})
    raise InputError(
        f"_class_name: got {class_name}, of which there are no single files, expected one of "
        f"{', '.join(known)}"
    )


def _some(entries: Iterable[str]) -> str:
    names = sorted(entries)
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "") or "no tensors"
