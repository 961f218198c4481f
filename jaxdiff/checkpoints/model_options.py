"""The options that name a model and what it is put together from, of all commands that read one."""

import dataclasses
from typing import Any

from jaxdiff.core.configs import Need


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Model:
    model: str | None = None
    """A diffusers folder, a checkpoint file or a Hub repository. Default: the embedded model."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ComponentOptions:
    """What takes the place of a model's own components, and what a checkpoint file does not say."""

    vae: str | None = None
    """A VAE instead of the model's own (also TAESD): a folder, a file or a Hub repository."""
    base: str | None = None
    """A diffusers folder or Hub repository with what a checkpoint file lacks: text encoders,
    tokenizers, VAE, schedule."""
    text_encoders: tuple[str, ...] = ()
    """Files with text encoders (T5, CLIP-L, CLIP bigG) for a checkpoint file. T5's tokenizer is in
    the base, or in spiece.model or tokenizer.json beside T5's file."""
    prediction_type: str | None = None
    """What the network of a checkpoint file predicts, such as v_prediction. Default: what the file
    says."""

    def components(self) -> dict[str, Any]:
        """Those that are given, as arguments of `jaxdiff.load` and `read_model`."""
        given = {name: getattr(self, name) for name in COMPONENTS}
        return {name: value for name, value in given.items() if value}


COMPONENTS = tuple(field.name for field in dataclasses.fields(ComponentOptions))
NEEDS = {"prediction_type": Need("model")}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelOptions(ComponentOptions, _Model):
    """A model, and what takes the place of its own components."""
