"""The fields of A1111's web UI API: which are honoured, and in which words.

A field that is listed in DEFAULTS_ONLY is accepted with a value that asks for nothing; any other
value gets 422 and a sentence.
"""

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from jaxdiff.core.aliases import WEB_UI_SAMPLERS
from jaxdiff.core.errors import InputError
from jaxdiff.generation.parameters_text import OPTION_WORDS, SAMPLER_WORDS, SCHEDULE_WORDS
from jaxdiff.samplers import SAMPLERS
from jaxdiff.serve.service import MAX_SEED

# Names of samplers: the web UI's, and those of this package that it has no name for.
SAMPLER_NAMES: Mapping[str, str] = {
    **WEB_UI_SAMPLERS,
    **{name: name for name in SAMPLERS if name not in SAMPLER_WORDS},
}
SCHEDULERS: Mapping[str, str | None] = {word: name for name, word in SCHEDULE_WORDS.items()}
UPSCALERS = ("None", "Lanczos", "Nearest")
LATENT_UPSCALER = "Latent"
CHURNED = ("euler", "heun")  # samplers with s_churn and the like
SAME = (None, "", "None", "Use same checkpoint", "Use same sampler", "Use same scheduler")
NOTHING: tuple[Any, ...] = (None, False, 0, "", (), "None")
DEFAULTS_ONLY: Mapping[str, tuple[Any, ...]] = {
    "styles": NOTHING,
    "subseed_strength": (None, 0),
    "seed_resize_from_h": (None, -1, 0),
    "seed_resize_from_w": (None, -1, 0),
    "restore_faces": NOTHING,
    "tiling": NOTHING,
    "save_images": NOTHING,
    "s_min_uncond": (None, 0),
    "refiner_checkpoint": NOTHING,
    "firstpass_image": NOTHING,
    "firstphase_width": NOTHING,
    "firstphase_height": NOTHING,
    "script_name": NOTHING,
    "script_args": NOTHING,
    "infotext": NOTHING,
    "hr_checkpoint_name": SAME,
    "hr_sampler_name": SAME,
    "hr_scheduler": SAME,
    "hr_prompt": NOTHING,
    "hr_negative_prompt": NOTHING,
    "image_cfg_scale": (None, 1.5),
    "mask_blur": (None, 0, 4),
    "mask_blur_x": (None, 0, 4),
    "mask_blur_y": (None, 0, 4),
    "mask_round": (None, True),
    "inpainting_fill": (None, 0, 1),
    "inpaint_full_res": (None, False, 0),
    "initial_noise_multiplier": (None, 1),
    "latent_mask": NOTHING,
    "include_init_images": NOTHING,
}
Text = Annotated[str, Field(max_length=32_000)]
Name = Annotated[str, Field(max_length=200)]
Count = Annotated[int, Field(ge=1)]


class WebUIFields(BaseModel):
    """What txt2img and img2img have in common."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    prompt: Text = ""
    negative_prompt: Text = ""
    seed: Annotated[int, Field(ge=-1, le=MAX_SEED)] = -1
    width: Count | None = None
    height: Count | None = None
    steps: Count | None = None
    cfg_scale: float | None = None
    sampler_name: Name | None = None
    sampler_index: Name | None = None
    scheduler: Name | None = None
    batch_size: Count = 1
    n_iter: Count = 1
    eta: float | None = None
    s_churn: float | None = None
    s_tmax: float | None = None
    s_tmin: float | None = None
    s_noise: float | None = None
    override_settings: dict[str, Any] | None = None
    override_settings_restore_afterwards: bool = True
    send_images: bool = True
    force_task_id: Name | None = None
    styles: list[Name] | None = None
    subseed: int | None = None
    subseed_strength: float | None = None
    seed_resize_from_h: int | None = None
    seed_resize_from_w: int | None = None
    restore_faces: bool | None = None
    tiling: bool | None = None
    do_not_save_samples: bool | None = None
    do_not_save_grid: bool | None = None
    save_images: bool | None = None
    s_min_uncond: float | None = None
    refiner_checkpoint: Name | None = None
    refiner_switch_at: float | None = None
    disable_extra_networks: bool | None = None
    comments: dict[str, Any] | None = None
    script_name: Name | None = None
    script_args: list[Any] | None = None
    alwayson_scripts: dict[str, Any] | None = None
    infotext: Text | None = None

    def check(self) -> None:
        """InputError for a value that cannot be honoured."""
        for name, accepted in DEFAULTS_ONLY.items():
            value = getattr(self, name, None)
            if (tuple(value) if isinstance(value, list) else value) not in accepted:
                raise InputError(f"{name}: got {value!a:.60}, which this server cannot do")
        for name, value in (self.alwayson_scripts or {}).items():
            arguments = value.get("args") if isinstance(value, dict) else value
            if arguments:
                raise InputError(f"alwayson_scripts: got {name!a:.60}, which this server lacks")

    def options(self) -> dict[str, Any]:
        """The options of a call of the pipeline; raises InputError."""
        self.check()
        name = self.sampler_name or self.sampler_index
        sampler, spacing = sampler_of(name) if name else (None, None)
        if self.scheduler is not None:
            spacing = scheduler_of(self.scheduler) or spacing
        own = {
            "negative_prompt": self.negative_prompt or None,
            "width": self.width,
            "height": self.height,
            "steps": self.steps,
            "guidance_scale": self.cfg_scale,
            "sampler": self._with_churn(sampler),
            "timestep_spacing": spacing,
            "eta": self.eta or None,
        }
        return {name: value for name, value in own.items() if value is not None}

    def _with_churn(self, sampler: str | None) -> str | None:
        """The sampler with the noise that it is to add."""
        neutral = {"s_churn": 0, "s_tmin": 0, "s_tmax": None, "s_noise": 1}
        given = {
            name: value
            for name, unset in neutral.items()
            if (value := getattr(self, name)) not in (None, unset)
            and not (name == "s_tmax" and value == 0)  # the web UI's word for no end
        }
        if not given:
            return sampler
        if sampler not in CHURNED or "s_churn" not in given:
            words = ", ".join(OPTION_WORDS[name] for name in given)
            raise InputError(
                f"{next(iter(given))}: got {words} with sampler {sampler}, expected s_churn too, "
                "and sampler Euler or Heun"
            )
        return f"{sampler}:{','.join(f'{name}={value:g}' for name, value in given.items())}"


class TextToImage(WebUIFields):
    """The body of txt2img."""

    denoising_strength: Annotated[float, Field(ge=0, le=1)] | None = None
    enable_hr: bool = False
    hr_scale: Annotated[float, Field(ge=1, le=8)] | None = None
    hr_upscaler: Name | None = None
    hr_second_pass_steps: Annotated[int, Field(ge=0)] | None = None
    hr_resize_x: Annotated[int, Field(ge=0)] | None = None
    hr_resize_y: Annotated[int, Field(ge=0)] | None = None
    hr_checkpoint_name: Name | None = None
    hr_sampler_name: Name | None = None
    hr_scheduler: Name | None = None
    hr_prompt: Text | None = None
    hr_negative_prompt: Text | None = None
    firstphase_width: int | None = None
    firstphase_height: int | None = None
    firstpass_image: Text | None = None


class ImageToImage(WebUIFields):
    """The body of img2img."""

    init_images: Annotated[list[str], Field(min_length=1, max_length=1)]
    mask: str | None = None
    denoising_strength: Annotated[float, Field(ge=0, le=1)] = 0.75
    inpainting_mask_invert: Annotated[int, Field(ge=0, le=1)] | None = None
    resize_mode: Annotated[int, Field(ge=0, le=1)] = 0
    image_cfg_scale: float | None = None
    mask_blur: int | None = None
    mask_blur_x: int | None = None
    mask_blur_y: int | None = None
    mask_round: bool | None = None
    inpainting_fill: int | None = None
    inpaint_full_res: bool | None = None
    inpaint_full_res_padding: int | None = None
    initial_noise_multiplier: float | None = None
    latent_mask: Text | None = None
    include_init_images: bool | None = None


def _plain(name: str) -> str:
    return name.lower().replace(" ", "_").replace("k_", "", 1)


_SAMPLERS = {_plain(word): name for word, name in SAMPLER_NAMES.items()} | {
    name: name for name in SAMPLERS
}
_SCHEDULERS = {_plain(word): name for word, name in SCHEDULERS.items()}
_SCHEDULERS |= {name: name for name in SCHEDULE_WORDS if name is not None}


def sampler_of(text: str) -> tuple[str, str | None]:
    """Sampler and spacing of a name of the web UI, such as "DPM++ 2M Karras"; raises InputError."""
    plain, spacing = _plain(text), None
    head, _, last = plain.rpartition("_")
    if plain not in _SAMPLERS and last in ("karras", "exponential"):
        plain, spacing = head, last
    if plain not in _SAMPLERS:
        raise InputError(f"sampler_name: got {text!a:.60}, expected one of {', '.join(_known())}")
    return _SAMPLERS[plain], spacing


def scheduler_of(text: str) -> str | None:
    """The spacing of a scheduler of the web UI; None: the model's own. Raises InputError."""
    if _plain(text) not in _SCHEDULERS:
        known = ", ".join(SCHEDULERS)
        raise InputError(f"scheduler: got {text!a:.60}, expected one of {known}")
    return _SCHEDULERS[_plain(text)]


def _known() -> list[str]:
    return list(SAMPLER_NAMES)


class ImagesAnswer(BaseModel):
    """The answer to txt2img and img2img."""

    images: list[str]
    parameters: dict[str, Any]
    info: str


class ProgressState(BaseModel):
    """What is generated now."""

    skipped: bool = False
    interrupted: bool = False
    stopping_generation: bool = False
    job: str = ""
    job_count: int = 0
    job_timestamp: str = "0"
    job_no: int = 0
    sampling_step: int = 0
    sampling_steps: int = 0


class Progress(BaseModel):
    """How far the requests of a client are."""

    progress: float
    eta_relative: float
    state: ProgressState
    current_image: str | None
    textinfo: str | None


class SamplerItem(BaseModel):
    """A sampler."""

    name: str
    aliases: list[str]
    options: dict[str, str]


class SchedulerItem(BaseModel):
    """A schedule of noise levels."""

    name: str
    label: str
    aliases: list[str] | None
    default_rho: float
    need_inner_model: bool


class UpscalerItem(BaseModel):
    """A way to enlarge images."""

    name: str
    model_name: str | None
    model_path: str | None
    model_url: str | None
    scale: float | None


class ModelItem(BaseModel):
    """A model."""

    title: str
    model_name: str
    hash: str | None
    sha256: str | None
    filename: str
    config: str | None


class LoRAItem(BaseModel):
    """A LoRA."""

    name: str
    alias: str
    path: str
    metadata: dict[str, Any]


class Embeddings(BaseModel):
    """Textual inversions."""

    loaded: dict[str, Any]
    skipped: dict[str, Any]


class PNGInfoFields(BaseModel):
    """The body of png-info."""

    model_config = ConfigDict(extra="forbid")

    image: str


class PNGInfo(BaseModel):
    """What a PNG file says of its generation."""

    info: str
    items: dict[str, Any]
    parameters: dict[str, Any]
