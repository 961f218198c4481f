"""Auxiliary networks of a pipeline: guidance model, classifier and CLIP."""

import hashlib
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar, cast

import jax
import numpy as np

from jaxdiff.checkpoints.clip_vision import read_image_processor
from jaxdiff.checkpoints.clip_vocabulary import clip_tokenizer
from jaxdiff.checkpoints.components import read_component
from jaxdiff.checkpoints.glide_clip import is_glide_clip, read_glide_clip
from jaxdiff.checkpoints.jsonfiles import read_object
from jaxdiff.core.errors import InputError
from jaxdiff.core.trees import content_digest
from jaxdiff.core.types import Bool, Float, NDArray
from jaxdiff.data.tokenizer import tokenize
from jaxdiff.diffusion.schedules import Schedule, VPSchedule
from jaxdiff.models.build import param_dict
from jaxdiff.models.classifier import LatentClassifier
from jaxdiff.models.clip import CLIPModel
from jaxdiff.models.image_processor import CLIPImageProcessor
from jaxdiff.models.prompt_labels import PROMPT_LABELS, PromptLabels, label_targets, prompt_labels
from jaxdiff.pipeline.classifier_guidance import ClassifierTarget, CLIPTarget, GuidanceTargets
from jaxdiff.pipeline.compiled_model import CompiledModel
from jaxdiff.pipeline.conditioning import PromptTokenizers
from jaxdiff.pipeline.prompts import parse_syntax
from jaxdiff.pipeline.request import Requests
from jaxdiff.pipeline.tokenizers import tokenizer_of

M = TypeVar("M")


class GuidanceModel(NamedTuple):
    """The parts of a pipeline that another one uses as its weaker model."""

    stages: CompiledModel
    tokenizers: PromptTokenizers
    latent_channels: int
    schedule: Schedule
    denoises_pixels: bool = False


class AuxiliaryModels:
    """The auxiliary networks that are loaded, and the guidance targets of requests."""

    def __init__(self, own: GuidanceModel, home: pathlib.Path | None) -> None:
        self.own = own  # the pipeline's, as the weaker model of another one
        self._home = home  # a model's folder, in which classifier/ and clip/ may lie
        self.guidance_model: GuidanceModel | None = None
        self.classifier: LatentClassifier | None = None
        self.prompt_labels: PromptLabels | None = None  # how prompts name its labels
        self.clip: CLIPModel | None = None
        self.image_processor: CLIPImageProcessor | None = None
        self._clip_tokenizer: Any = None  # of a CLIP that has its own; None: the model's first

    def load_classifier(self, folder: pathlib.Path) -> None:
        """Load the classifier of noisy latents in `folder`; InputError for any other model."""
        module = self._read("classifier", folder, LatentClassifier)
        source = folder / PROMPT_LABELS
        values = read_object(source) if source.is_file() else {}
        labels = prompt_labels(values, module.config.attributes, source=str(source))
        self.classifier, self.prompt_labels = module, labels
        self._use()

    def load_clip(self, folder: pathlib.Path) -> None:
        """Load the CLIP model in `folder`; InputError for any other model."""
        of_glide = is_glide_clip(folder)
        if of_glide:
            module = read_glide_clip(folder, sharding=self.own.stages.layout.sharding)
        else:
            module = self._read("clip", folder, CLIPModel)
        config = module.vision_model.config
        if config.noise_steps is not None:
            self._check_noisy(config.noise_steps, folder)
        self.clip = module
        self._clip_tokenizer = tokenizer_of(clip_tokenizer("!")) if of_glide else None
        self.image_processor = read_image_processor(folder, config.image_size)
        self._use()

    def _check_noisy(self, steps: int, folder: pathlib.Path) -> None:
        """InputError unless a CLIP of images at so many `steps` of noise sees the model's."""
        schedule = self.own.schedule
        own = schedule.num_train_timesteps if isinstance(schedule, VPSchedule) else None
        if not self.own.denoises_pixels or steps != own:
            raise InputError(
                f"clip: got a CLIP of noisy images with {steps} timesteps in {folder}, expected "
                "one that sees images without noise, as it guides models of pixels with as many "
                "timesteps alone"
            )

    def _read(self, name: str, folder: pathlib.Path, kind: type[M]) -> M:
        """The network in `folder`; InputError, which begins with `name`, unless it is a `kind`."""
        if not folder.is_dir():
            raise InputError(f"{name}: got {folder} (no such folder), expected a {kind.__name__}")
        module = read_component(folder, sharding=self.own.stages.layout.sharding).module
        if not isinstance(module, kind):
            raise InputError(
                f"{name}: got {type(module).__name__} in {folder}, expected a {kind.__name__}"
            )
        return module

    def set_guidance_model(self, weaker: GuidanceModel | None) -> None:
        """Set the weaker model; InputError unless it has this one's channels and schedule."""
        if weaker is not None and weaker.latent_channels != self.own.latent_channels:
            raise InputError(
                f"guidance_model: got a model with {weaker.latent_channels} latent channels, "
                f"expected {self.own.latent_channels}"
            )
        if weaker is not None and weaker.schedule != self.own.schedule:
            raise InputError(
                "guidance_model: got a model with another noise schedule, expected the same one"
            )
        if weaker is not None and weaker.stages.layout.mesh != self.own.stages.layout.mesh:
            raise InputError(
                f"guidance_model: got a model with {weaker.stages.layout}, expected one with "
                f"{self.own.stages.layout}, as the main model has"
            )
        self.guidance_model = weaker
        self._use()

    def _use(self) -> None:
        """Let the loop use the networks that are loaded now."""
        self.own.stages.set_auxiliary_models(
            guidance_model=None if self.guidance_model is None else self.guidance_model.stages,
            classifier=self.classifier,
            clip=self.clip,
            image_processor=self.image_processor,
        )

    def load_missing(self, requests: Requests) -> None:
        """Load what requests need and the model's own folder has; InputError if it has not."""
        wanted = {
            "classifier": any(requests.classifier_scales) and self.classifier is None,
            "clip": any(requests.clip_scales) and self.clip is None,
        }
        for name in (name for name, missing in wanted.items() if missing):
            folder = None if self._home is None else self._home / name
            if folder is None or not folder.is_dir():
                raise InputError(
                    f"{name}: got none, expected the folder of one, because {name}_scale is set"
                )
            getattr(self, f"load_{name}")(folder)

    def fingerprints(self, requests: Requests) -> dict[str, str]:
        """A short hash of the classifier and of the CLIP model, where requests use them."""
        self.load_missing(requests)
        found = {}
        if self.classifier is not None and any(requests.classifier_scales):
            labels = hashlib.sha256(repr(self.prompt_labels).encode()).hexdigest()
            found["classifier"] = content_digest(param_dict(self.classifier)) + labels
        if self.clip is not None and any(requests.clip_scales):
            found["clip"] = content_digest(param_dict(self.clip)) + repr(self.image_processor)
        return {
            name: hashlib.sha256(content.encode()).hexdigest()[:12]
            for name, content in found.items()
        }

    def guidance_targets(self, requests: Requests) -> GuidanceTargets:
        """The classifier and CLIP guidance targets of requests."""
        attributes = likeness = None
        if any(requests.classifier_scales):
            columns = self._labels(requests)
            attributes = ClassifierTarget(
                *cast(Any, (_scales(requests.classifier_scales), *columns))
            )
        if any(requests.clip_scales):
            text = self._text(requests)
            likeness = CLIPTarget(*cast(Any, (_scales(requests.clip_scales), text)))
        return GuidanceTargets(attributes, likeness)

    def _labels(self, requests: Requests) -> list[Bool[NDArray, "b n"]]:
        """The target labels of each prompt, and which are known: none at scale 0."""
        if self.classifier is None or self.prompt_labels is None:
            raise InputError(
                "classifier: got none, expected the folder of one, because classifier_scale is set"
            )
        labels = self.classifier.config.attributes
        pairs = zip(requests.prompts, requests.classifier_scales, strict=True)
        found = [
            self.prompt_labels.labels_of(text, labels) if scale else label_targets(labels, {}, {})
            for text, scale in pairs
        ]
        return [np.stack(column) for column in zip(*found, strict=True)]

    def _text(self, requests: Requests) -> Float[NDArray, "b p"]:
        """CLIP's embeddings of the prompts."""
        texts = list(requests.prompts)
        if requests[0].prompt_syntax:
            texts = ["".join(piece.text or " " for piece in parse_syntax(text)) for text in texts]
        ids = tokenize(self._clip_tokenizer or self.own.tokenizers.first.tokenizer, texts)
        if self.clip is None:
            raise InputError(
                "clip: got none, expected the folder of one, because clip_scale is set"
            )
        tokens = self.clip.text_model.config.max_position_embeddings
        if ids.shape[1] != tokens:
            raise InputError(
                f"clip: got a model for prompts of {tokens} tokens, expected {ids.shape[1]} tokens"
            )
        return np.asarray(jax.jit(self.clip.text_embeds)(ids))


def _scales(scales: Sequence[float | None]) -> Float[NDArray, "b"]:
    return np.asarray([scale or 0.0 for scale in scales], np.float32)
