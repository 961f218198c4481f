"""The config of the data."""

import dataclasses

from jaxdiff.core.errors import InputError
from jaxdiff.core.validate import in_range, one_of, positive
from jaxdiff.training.config.aliases import config_section

VARIATIONS = (1, 2, 4, 8)
# Kinds of data that a program renders, and the module of each: see experiments/procedural.py.
PROCEDURAL_KINDS = {"scenes": "jaxdiff.scenes.dataset"}
_STORED = {"kind", "seed", "threads", "path", "max_bad_fraction", "validation_size", "caption"}
_PREPARED = _STORED | {
    "resolution",
    "max_aspect_ratio",
    "bucket_multiple",
    "crop",
    "flip",
    "cache_dir",
}
_RENDERED = {"kind", "seed", "threads", "variations", "resolution", "num_scenes"}
_TABLE = {"split", "image_key", "caption_key"}
# Kinds of data that are stored images, and the fields that each uses beside those that all do. What
# opens them is in IMAGE_SOURCES of experiments/datasets.py.
IMAGE_KINDS: dict[str, set[str]] = {
    "folder": {"caption_key"},
    "tars": {"caption_key"},
    "records": set(),
    "parquet": _TABLE,
    "hub": _TABLE,
}


def data_fields() -> dict[str, set[str]]:
    """The fields that each kind of data uses."""
    images = {kind: _PREPARED | fields for kind, fields in IMAGE_KINDS.items()}
    return {
        **dict.fromkeys(PROCEDURAL_KINDS, _RENDERED),
        **images,
        "latents": _STORED | {"text_embeddings"},
    }


@config_section("data")
@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The data of a training: procedural scenes, stored images with captions, or cached latents.

    A kind in IMAGE_KINDS reads images, `latents` the output of `jaxdiff cache-latents`.
    """

    kind: str = "scenes"  # scenes, folder, tars, records, parquet, hub or latents
    path: str | None = None  # folder or URL of the data; for hub the name of a dataset
    seed: int = 0  # of scenes, crops, flips and order
    variations: int = 1  # length of the runs of scenes that differ by one minimal change
    num_scenes: int | None = (
        None  # scenes to encode with cache-latents; trainings have endless ones
    )
    # side in pixels of the square images, or of buckets' square; None: 64 for scenes
    resolution: int | None = None
    max_aspect_ratio: float = 1.0  # above 1: aspect-ratio buckets up to this ratio of sides
    bucket_multiple: int = 64  # sides of buckets are multiples of it
    crop: str = "centre"  # of resized images: centre or random
    flip: bool = False  # whether half of the images are mirrored
    split: str = "train"  # of a Hugging Face dataset
    image_key: str = "image"  # its column of images
    caption_key: str = "text"  # its column of captions; in metadata and JSON files their key
    caption: str | None = None  # of all images, instead of their own
    # whether latents must have embeddings of their captions (cache-latents --texts embeddings), as
    # a plan takes for granted where there are no data yet
    text_embeddings: bool = False
    max_bad_fraction: float = 0.05  # fraction of unusable items above which training stops
    validation_size: int = 64  # items in the validation split, at most a tenth of all
    threads: int = 1  # threads that prepare batches
    cache_dir: str | None = None  # folder of indices and image sizes; None: the user's

    def __post_init__(self) -> None:
        used = data_fields()[one_of("data.kind", self.kind, data_fields())]
        in_range("data.seed", self.seed, 0, 2**31 - 1)
        one_of("data.variations", self.variations, VARIATIONS)  # divisors of VALIDATION_BATCH
        in_range("data.max_aspect_ratio", self.max_aspect_ratio, 1, 16)
        positive("data.bucket_multiple", self.bucket_multiple)
        one_of("data.crop", self.crop, ("centre", "random"))
        in_range("data.max_bad_fraction", self.max_bad_fraction, 0, 1)
        in_range("data.validation_size", self.validation_size, 1, 1 << 20)
        in_range("data.threads", self.threads, 0, 64)
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value != field.default and field.name not in used:
                raise InputError(
                    f"data.{field.name}: got {value!r}, expected {field.default!r} for data.kind "
                    f"{self.kind}, which does not read it"
                )
        if self.kind not in PROCEDURAL_KINDS and self.path is None:
            raise InputError(f"data.path: got none, expected one for data.kind {self.kind}")
        if self.kind in IMAGE_KINDS:
            side = positive("data.resolution", self.resolution or 0)
            if side % self.bucket_multiple:
                raise InputError(
                    f"data.resolution: got {side}, expected a multiple of data.bucket_multiple, "
                    f"{self.bucket_multiple}"
                )
