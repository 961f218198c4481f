"""The folder that gives what a single file lacks: text encoders, tokenizers, VAE, schedule."""

import pathlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxdiff.checkpoints.components import (
    CONFIG,
    Component,
    abstract_component,
    read_component,
    shape_options,
)
from jaxdiff.checkpoints.jsonfiles import read_object
from jaxdiff.checkpoints.pipelines import (
    INDEX,
    SCHEDULER,
    component_classes,
    plain_values,
    read_index,
)
from jaxdiff.checkpoints.single_file_layouts import FileComponent, SingleFileLayout
from jaxdiff.checkpoints.tokenizers import TokenizerFiles, read_tokenizer
from jaxdiff.checkpoints.weights import variants
from jaxdiff.core.errors import InputError

_VAES = ("AutoencoderKL", "AutoencoderTiny")


@dataclass(frozen=True, kw_only=True)
class BaseFolder:
    """A pipeline folder, of which nothing but model_index.json is read yet."""

    folder: pathlib.Path
    pipeline: str  # its class
    classes: Mapping[str, str | None]  # of its components; None for absent ones
    options: Mapping[str, Any]  # plain values of model_index.json

    def find(self, part: FileComponent) -> str | None:
        """The component of the same name and class, or the only one of the class, if any."""
        fits = _VAES if part.class_name in _VAES else (part.class_name,)
        found = [name for name, cls in self.classes.items() if cls in fits]
        if part.name in found:
            return part.name
        return found[0] if len(found) == 1 else None

    def component(self, part: FileComponent) -> str:
        """As `find`; InputError if there is none."""
        name = self.find(part)
        if name is None:
            raise InputError(
                f"base: got {self.folder} without a {part.class_name}, expected one for {part.name}"
            )
        return name

    def read(
        self, part: FileComponent, *, weights: bool, variant: str | None = None, **options: Any
    ) -> Component:
        """The component in place of one that a file lacks; `options` are `read_component`'s.

        Without `weights` the module has shapes.
        """
        name = self.component(part)
        place, cls = self.folder / name, self.classes[name]
        if not weights:
            module = abstract_component(place, class_name=cls, **shape_options(options))
            return Component(module=module, config=read_object(place / CONFIG))
        own = variant if variant in variants(place) else None
        return read_component(place, class_name=cls, variant=own, **options)

    def tokenizer(self, part: FileComponent) -> TokenizerFiles:
        """The tokenizer of the text encoder in place of one that a file lacks."""
        name = self.component(part)
        name = part.tokenizer if name == part.name else name.replace("text_encoder", "tokenizer")
        cls = self.classes.get(name or "")
        if cls is None:
            raise InputError(f"base: got {self.folder} without {name}, expected it")
        return read_tokenizer(
            self.folder / str(name), class_name=cls, source=f"{self.folder / INDEX}: {name}"
        )

    def scheduler(self, layout: SingleFileLayout, network: Mapping[str, Any]) -> Mapping[str, Any]:
        """The scheduler_config.json, where the base has a network of the same config, `network`.

        That of the layout for others, and for a family whose files say it themselves.
        """
        own = self.folder / layout.network.name / CONFIG
        config = read_object(own) if own.is_file() else {}
        differ = [
            key for key in network.keys() & config if _plain(config[key]) != _plain(network[key])
        ]
        if layout.stores_schedule or differ:
            return layout.scheduler
        scheduler = read_object(self.folder / SCHEDULER / "scheduler_config.json")
        return scheduler | {"_class_name": self.classes[SCHEDULER]}


def open_base(folder: pathlib.Path) -> BaseFolder:
    """The base in a pipeline folder; InputError if it is none."""
    if folder.is_file():
        raise InputError(f"base: got the file {folder}, expected a diffusers folder")
    index = read_index(folder)
    classes = component_classes(index, str(folder / INDEX))
    return BaseFolder(
        folder=folder,
        pipeline=index["_class_name"].removeprefix("Flax"),
        classes=classes,
        options=plain_values(index),
    )


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
