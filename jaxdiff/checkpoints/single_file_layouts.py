"""What a layout of single files is: the components of a model in one file, and what they become.

`layout_registry` has the layouts of all families. No jax here: what is in a file shows without.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from jaxdiff.checkpoints import leftovers
from jaxdiff.checkpoints.safetensors import LazyTensor, TensorInfo

UNET = "model.diffusion_model."  # before the names of the network that denoises, not of UNets only
VAE = "first_stage_model."
VAES = (VAE, "vae.")
ANOTHER_VAE = "a VAE of its own (--vae FILE, vae=...)"  # what a model without one can get
BASE = "a model with the rest (--base FOLDER, base=...)"  # for files that lack components
# for those that lack text encoders
TEXT_ENCODERS = "text encoders in files of their own (--text-encoders FILE ..., text_encoders=...)"
VAE_CLASSES = ("AutoencoderKL", "VQModel")

Entries = Mapping[str, TensorInfo]
Tensors = Mapping[str, LazyTensor]


@dataclass(frozen=True, kw_only=True)
class FileComponent:
    """A component in a single file: where it is, how it is written, what it becomes."""

    name: str  # of the component: unet, vae, text_encoder, ...
    class_name: str  # in diffusers or transformers
    prefix: str  # of its tensors in the file
    config: Callable[[Entries], Mapping[str, Any]]  # what shapes tell; names are diffusers'
    read: Callable[[Entries], dict[str, TensorInfo]] = dict  # to the names of diffusers
    write: Callable[[Tensors], dict[str, LazyTensor]] = dict  # and back
    tokenizer: str | None = None  # the component that makes its token ids
    pad: str | None = None  # token that fills short prompts; None: it is not CLIP's tokenizer
    optional: bool = False  # the model generates without it
    unused: str = leftovers.SILENT  # kind of the tensors that `read` leaves out
    # Of text encoders that can have a file of their own: the field of the network's config with
    # the width of what it takes from them, and `read` for such a file where that is another.
    width: str | None = None
    alone: Callable[[Entries], dict[str, TensorInfo]] | None = None


@dataclass(frozen=True, kw_only=True)
class SingleFileLayout:
    """What the single files of a family share and their tensors do not say."""

    name: str
    pipeline: str  # class in diffusers
    components: tuple[FileComponent, ...]  # the network that denoises is the first
    scheduler: Mapping[str, Any]
    # Fields of the configs by component, which shapes do not tell, or tell wrong.
    fields: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)  # of model_index.json
    stores_schedule: bool = True  # a file can; else the schedule of a base counts
    # Classes of other models with the same tensors; a base of one of them says that it is one.
    alternatives: tuple[str, ...] = ()
    # Tensors that belong to a component and are not below its prefix: the names that they get.
    moved: Mapping[str, str] = field(default_factory=dict)

    @property
    def network(self) -> FileComponent:
        """The network that denoises."""
        return self.components[0]

    @property
    def vae(self) -> str | None:
        """The component of the VAE, which need not be called so; None for models of pixels."""
        names = (part.name for part in self.components if part.class_name in VAE_CLASSES)
        return next(names, None)

    @property
    def classes(self) -> dict[str, str]:
        """The class of each component by its prefix; one without a prefix is the last."""
        ordered = sorted(self.components, key=lambda part: not part.prefix)
        return {part.prefix: part.class_name for part in ordered}

    @property
    def scaling_factor(self) -> float:
        """What the latents of the VAE are multiplied by."""
        return self.fields.get(self.vae or "", {}).get("scaling_factor", 1.0)

    def below_prefixes(self, entries: Entries) -> dict[str, TensorInfo]:
        """The tensors of a file, all of a component below its prefix."""
        return {self.moved.get(name, name): entry for name, entry in entries.items()}

    def above_prefixes(self, tensors: Tensors) -> dict[str, LazyTensor]:
        """The inverse of `below_prefixes`."""
        names = {own: name for name, own in self.moved.items()}
        return {names.get(name, name): tensor for name, tensor in tensors.items()}

    def config(self, part: FileComponent, tensors: Entries) -> dict[str, Any]:
        """The fields of a component's config.json, its `tensors` under the names of diffusers."""
        return {**part.config(tensors), **self.fields.get(part.name, {})}


def first_prefix(names: Iterable[str], prefixes: Iterable[str]) -> str:
    """The first of the prefixes that some name has, or the first of all."""
    names, prefixes = list(names), list(prefixes)
    found = (prefix for prefix in prefixes if any(name.startswith(prefix) for name in names))
    return next(found, prefixes[0])


def source_of(entries: Entries) -> str:
    """The file of these tensors, for errors."""
    return str(next(iter(entries.values())).path) if entries else "checkpoint"
