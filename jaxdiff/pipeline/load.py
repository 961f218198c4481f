"""`load`: a model folder, or the embedded model, as a `Pipeline`; several models as a `Cascade`."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from jaxdiff.checkpoints.embedded import EMBEDDED
from jaxdiff.checkpoints.loading import Placement, host_memory
from jaxdiff.checkpoints.models import read_model
from jaxdiff.checkpoints.pipelines import PipelineComponents
from jaxdiff.core.aliases import rename_arguments
from jaxdiff.core.errors import InputError
from jaxdiff.core.types import dtype_of
from jaxdiff.families.detection import family_of
from jaxdiff.models.build import param_dict
from jaxdiff.parallel.mesh import FSDP, TENSOR, MeshSpec, data_mesh, replicated, sampling_mesh
from jaxdiff.parallel.sharding import infer_sharding, infer_shardings
from jaxdiff.pipeline import cache
from jaxdiff.pipeline.cascade import Cascade
from jaxdiff.pipeline.offload import TEXT, check_offload
from jaxdiff.pipeline.pipeline import Pipeline


@rename_arguments
def load(
    path: str | pathlib.Path | None = None,
    dtype: str | None = None,
    *,
    mesh: MeshSpec | None = None,
    variant: str | None = None,
    prediction_type: str | None = None,
    vae: str | pathlib.Path | None = None,
    base: str | pathlib.Path | None = None,
    text_encoders: str | pathlib.Path | Sequence[str | pathlib.Path] = (),
    offload: str | None = None,
) -> Pipeline | Any:
    """The model at `path` on all local devices; without `path` the embedded one.

    `path` is a diffusers folder, a checkpoint file in the original layout (.safetensors, .ckpt), or
    a repository of the Hub (owner/name). A folder with several models that follow one another, such
    as Karlo's, is a `Cascade`.

    `dtype` is what the networks compute in and keep their weights in: float32, bfloat16 or float16;
    by default float32 on CPU and bfloat16 elsewhere. `mesh`, such as {"fsdp": 4, "tensor": 2} or
    "fsdp=4,tensor=2", shares the weights and the work on an image between devices; without it each
    device has all weights. `variant` picks weight files such as "fp16"; `prediction_type` overrules
    what a single file says that its network predicts. `vae`, which may be in any of these places or
    a file or folder with a VAE alone, also TAESD, is used instead of the model's own. `base`, a
    diffusers folder or a repository, gives what a checkpoint file lacks: text encoders, tokenizers,
    VAE and schedule. `text_encoders` are files with T5, CLIP-L or CLIP bigG, used instead of those
    of a checkpoint file; T5's tokenizer, if no base has it, is a spiece.model or tokenizer.json
    beside it. `offload` "text" keeps the text encoders' weights on the host, and on the
    devices only while prompts are encoded; that changes no image. Raises InputError for anything
    missing, broken or unknown.
    """
    check_offload(offload)
    shared = None if mesh is None else sampling_mesh(mesh, jax.local_devices())
    devices = jax.local_devices() if shared is None else list(shared.devices.flat)
    default = "float32" if devices[0].platform == "cpu" else "bfloat16"
    cache.enable()
    if path is None and not EMBEDDED.is_dir():
        raise InputError(
            "model: got none (this installation has no embedded model), expected a diffusers folder"
        )
    source = EMBEDDED if path is None else path
    read = functools.partial(
        read_model,
        source,
        dtype_of(dtype or default),
        variant=variant,
        prediction_type=prediction_type,
        vae=vae,
        base=base,
        text_encoders=text_encoders,
    )
    folder = pathlib.Path(source)
    name = folder.resolve().name
    if shared is None:
        place = replicated(data_mesh(devices))
    else:
        _check_split(read(only=()), shared)
        place = functools.partial(infer_sharding, mesh=shared)
    parts = _with_texts_on_host(read, place, name) if offload == TEXT else read(sharding=place)
    pipes = [
        Pipeline(
            stage,
            name=f"{name}/{own}" if own else name,
            devices=devices,
            mesh=shared,
            offload=offload,
            folder=folder if folder.is_dir() else None,
        )
        for own, stage in parts.stages().items()
    ]
    return pipes[0] if len(pipes) == 1 else Cascade(*pipes)


def models_of(loaded: Pipeline | Any) -> list[Any]:
    """The models that `load` gave, in the order in which they run."""
    return list(loaded.pipes) if isinstance(loaded, Cascade) else [loaded]


def one_model(loaded: Pipeline | Any) -> Any:
    """The model that `load` gave; InputError for several."""
    first, *others = models_of(loaded)
    if others:
        names = ", ".join(pipe.family.name for pipe in (first, *others))
        raise InputError(f"model: got a folder of several models ({names}), expected one model")
    return first


def _with_texts_on_host(
    read: Callable[..., PipelineComponents], place: Placement, name: str
) -> PipelineComponents:
    """The model, its text encoders on the host and all else in `place`; InputError without a CPU.

    The text encoders' weights never come to other devices.
    """
    host = host_memory()
    if host is None:
        raise InputError(
            f"offload: got {TEXT!r} where JAX sees no CPU, expected cpu among JAX_PLATFORMS"
        )
    described = read(only=())
    families = [family_of(stage, name) for stage in described.stages().values()]
    texts = {spec.component for family in families for spec in family.text_encoders}
    if not texts:
        raise InputError(f"offload: got {TEXT!r} for {families[0].name}, which has no text encoder")
    parts = read(sharding=place, only=described.components.keys() - texts)
    offloaded = read(sharding=host, only=texts).components
    components = {
        component: offloaded[component] if component in texts else part
        for component, part in parts.components.items()
    }
    return dataclasses.replace(parts, components=components)


def _check_split(parts: PipelineComponents, mesh: Mesh) -> None:
    """InputError if an axis of `mesh` that splits weights divides none of the model's."""
    shapes = {name: param_dict(part.module) for name, part in parts.components.items()}
    found = jax.tree.leaves(infer_shardings(shapes, mesh))
    for axis in (FSDP, TENSOR):
        if mesh.shape[axis] > 1 and not any(axis in place.spec for place in found):
            raise InputError(
                f"mesh.{axis}: got {mesh.shape[axis]}, expected a size that divides some of the "
                "model's weights"
            )
