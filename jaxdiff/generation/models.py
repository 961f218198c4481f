"""What a model gets before it generates, and how PNG settings record it."""

import dataclasses
import hashlib
import json
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import jaxdiff
from jaxdiff.checkpoints import lora_names
from jaxdiff.checkpoints.embedded import EMBEDDED
from jaxdiff.checkpoints.models import check_source
from jaxdiff.checkpoints.weights import read_weights
from jaxdiff.core.configs import prefix_errors
from jaxdiff.core.errors import InputError
from jaxdiff.core.notation import model_and_options
from jaxdiff.core.trees import content_digest
from jaxdiff.core.validate import in_range
from jaxdiff.generation.png_files import file_digest
from jaxdiff.guidance.base import parse
from jaxdiff.models.build import param_dict
from jaxdiff.pipeline.embedding_decoder import check_stages, following_stage
from jaxdiff.pipeline.load import one_model
from jaxdiff.pipeline.request import check_options
from jaxdiff.pipeline.stages import (
    MAX_ENLARGEMENT,
    START,
    STRENGTH,
    HiresFix,
    Refiner,
    Stage,
)


def load_addons(
    pipe: Any,
    *,
    loras: Sequence[str] = (),
    textual_inversions: Sequence[pathlib.Path] = (),
    classifier: pathlib.Path | None = None,
    clip: pathlib.Path | None = None,
    guidance_model: str | None = None,
    guidance: str | None = None,  # the rule that the images have; None: the model's own
    dtype: str | None = None,
) -> dict[str, Any]:
    """Load LoRAs (PATH or PATH:SCALE), textual inversions and auxiliary models into `pipe`.

    Returns their entries in the settings, which have a digest of each file, so that another file
    of that name is noticed.
    """
    scales = {}
    for lora in loras:
        path, scale = lora_names.path_and_scale(lora)
        name = pipe.load_lora(path, scale)
        scales[f"{name} {file_digest(*lora_names.files(path))}"] = scale
    tokens = [
        f"{pipe.load_textual_inversion(path)} {file_digest(path)}" for path in textual_inversions
    ]
    settings: dict[str, Any] = {"loras": scales, "textual_inversions": tokens}
    if classifier is not None:
        pipe.load_classifier(classifier)
    if clip is not None:
        pipe.load_clip(clip)
    if guidance_model is not None:
        check_guidance_model(guidance or pipe.defaults.guidance)
        weaker = one_model(
            jaxdiff.load(guidance_model, dtype, mesh=pipe.mesh, offload=pipe.offload)
        )
        pipe.set_guidance_model(weaker)
        settings["guidance_model"] = f"{weaker.name} {weaker.fingerprint}"
    return {name: value for name, value in settings.items() if value}


def check_addons(
    *,
    loras: Sequence[str] = (),
    textual_inversions: Sequence[pathlib.Path] = (),
    classifier: pathlib.Path | None = None,
    clip: pathlib.Path | None = None,
    guidance_model: str | None = None,
    guidance: str | None = None,
    refiner: str | None = None,
    then: Sequence[str] = (),
) -> None:
    """InputError for what is not there to be loaded; the arguments are those of `load_addons`."""
    for lora in loras:
        read_weights(lora_names.weights_file(lora_names.path_and_scale(lora)[0]))
    for path in textual_inversions:
        if not path.is_file():
            raise InputError(f"{path}: got no such file, expected a textual inversion")
    for name, folder in (("classifier", classifier), ("clip", clip)):
        if folder is not None and not folder.is_dir():
            raise InputError(f"{name}: got {folder} (no such folder), expected the folder of one")
    named = [("guidance_model", guidance_model), ("refiner", refiner)]
    for name, source in (*named, *(("then", enlarging_model(text)[0] or None) for text in then)):
        if source is not None:
            check_source(source, name=name)
    if guidance_model is not None and guidance is not None:
        check_guidance_model(guidance)


def stored_bytes(model: str | None) -> int:
    """The size of the files of a model (None: the embedded one); infinite if it is not here yet."""
    path = pathlib.Path(model or EMBEDDED)
    if path.is_file():
        return path.stat().st_size
    if path.is_dir():
        return sum(file.stat().st_size for file in path.rglob("*.safetensors"))
    return sys.maxsize


def vae_setting(source: str, codec: Any) -> str:
    """The entry of a VAE of its own in the settings: its name, and a digest of all of it."""
    content = content_digest(param_dict(codec)) + repr(codec.config)
    return f"{pathlib.Path(source).name} {hashlib.sha256(content.encode()).hexdigest()[:12]}"


def text_encoders_setting(paths: Sequence[str]) -> list[str]:
    """The entry of text encoders' files in the settings: names, as "weights" has their content."""
    return sorted(pathlib.Path(path).name for path in paths)


def check_guidance_model(*rules: str) -> None:
    """InputError unless one of the guidance rules evaluates a weaker model."""
    if not any(stream.network == "guidance_model" for r in rules for stream in parse(r).streams):
        raise InputError(
            f"guidance_model: got one with guidance {', '.join(rules)}, expected guidance "
            "autoguidance"
        )


def enlarging_model(text: str) -> tuple[str, dict[str, Any]]:
    """The model and its options of requests in MODEL:NAME=VALUE,NAME=VALUE; raises InputError.

    Without a name the model is the next one of a folder with several.
    """
    model, pairs = model_and_options("then", text)
    options = {name: _number(value) for name, value in pairs.items()}
    with prefix_errors(f"then: {model}"):
        check_options(options)
    return model, options


def _number(text: str) -> Any:
    """The number or truth value that a text is, or else the text."""
    try:
        return json.loads(text)
    except ValueError:
        return text


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageOptions:
    """What follows the model that begins.

    First a hires fix, or a refiner that takes over, and then models that enlarge the images, or
    make them of the embeddings of a prior.
    """

    hires_scale: float | None = None  # None: no hires fix
    hires_strength: float | None = None  # None: STRENGTH
    refiner: str | None = None  # None: no refiner
    refiner_start: float | None = None  # None: START
    vae: str | None = None  # of the refiner; None: its own
    then: Sequence[str] = ()  # as `enlarging_model` reads them

    def __post_init__(self) -> None:
        if self.hires_scale is not None and self.refiner is not None:
            raise InputError(
                "hires_scale: got it together with a refiner, expected only one of them"
            )
        limits = {"hires_scale": (1, MAX_ENLARGEMENT)}
        for name in ("hires_scale", "hires_strength", "refiner_start"):
            if (value := getattr(self, name)) is not None:
                in_range(name, value, *limits.get(name, (0, 1)))

    def stages(self, pipe: Any, dtype: str | None, others: Sequence[Any] = ()) -> list[Stage]:
        """The stages that follow `pipe`, their models loaded, first the `others` of its folder."""
        following = [enlarging_model(text) for text in self.then]
        own = [options for path, options in following if not path]
        if len(own) > len(others):
            raise InputError(
                f"then: got the options of {len(own)} models without a name, expected those of "
                f"{len(others)}, as many as follow the first one in its folder"
            )
        models = [*zip(others, [*own, *({} for _ in others[len(own) :])], strict=True)]
        models += [
            (one_model(jaxdiff.load(path, dtype, mesh=pipe.mesh, offload=pipe.offload)), options)
            for path, options in following
            if path
        ]
        enlarging = [following_stage(model, pipe, options) for model, options in models]
        stages = [*self._of_latents(pipe, dtype), *enlarging]
        if pipe.family.embeddings is not None and not stages:
            raise InputError(
                f"model: got {pipe.family.name} alone, which generates embeddings, expected --then "
                "DECODER"
            )
        check_stages(pipe, stages)
        return stages

    def _of_latents(self, pipe: Any, dtype: str | None) -> list[Stage]:
        """The hires fix or the refiner."""
        if self.hires_scale is not None:
            strength = STRENGTH if self.hires_strength is None else self.hires_strength
            return [HiresFix(pipe, self.hires_scale, strength)]
        if self.refiner is not None:
            start = START if self.refiner_start is None else self.refiner_start
            model = jaxdiff.load(
                self.refiner, dtype, mesh=pipe.mesh, vae=self.vae, offload=pipe.offload
            )
            refiner = Refiner(one_model(model), start)
            refiner.check(pipe)
            return [refiner]
        return []
