"""Which pictures are seen."""

import dataclasses

from jaxdiff.core.errors import InputError
from jaxdiff.core.validate import in_range, one_of, positive

VARIATIONS = (1, 2, 4, 8)
PICTURES = (
    "folder",
    "tars",
    "records",
    "parquet",
    "hub",
)  # kinds of data that are pictures as stored
_STORED = {"kind", "seed", "threads", "path", "max_broken", "held_out", "caption"}
_PREPARED = _STORED | {"resolution", "widest", "cell", "crop", "flip", "cache"}
_TABLE = {"split", "image_key", "caption_key"}
# The fields that count for each kind of data.
DATA_FIELDS: dict[str, set[str]] = {
    "scenes": {"kind", "seed", "threads", "variations", "resolution", "items"},
    "folder": _PREPARED | {"caption_key"},
    "tars": _PREPARED,
    "records": _PREPARED,
    "parquet": _PREPARED | _TABLE,
    "hub": _PREPARED | _TABLE,
    "latents": _STORED,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which pictures are seen: procedural scenes, captioned pictures that are stored, or latents.

    A kind in PICTURES reads pictures, `latents` what `jaxdiff cache-latents` has made of them.
    """

    kind: str = "scenes"  # scenes, folder, tars, records, parquet, hub or latents
    path: str | None = None  # folder or URL of what is stored; for hub a dataset's name
    seed: int = 0  # of the scenes, of crops and flips, and of their order
    variations: int = 1  # how many of a batch's consecutive scenes differ in one thing only
    items: int | None = None  # scenes that cache-latents encodes; trainings take endless ones
    # side in pixels of the squares that pictures are brought to; of scenes 64 when left out
    resolution: int | None = None
    widest: float = 1.0  # largest ratio of sides, for buckets of other shapes than the square
    cell: int = 64  # sides of the buckets are multiples of it
    crop: str = "centre"  # what is cut out of a resized picture: centre or random
    flip: bool = False  # whether half of the pictures are mirrored
    split: str = "train"  # of a Hugging Face dataset
    image_key: str = "image"  # its column of pictures
    caption_key: str = "text"  # its column of captions; in metadata.jsonl the key of captions
    caption: str | None = None  # of all pictures, in place of their own, which are not asked for
    max_broken: float = 0.05  # share of unusable items above which training ends
    held_out: int = 64  # items that are validated and not trained on; at most a tenth
    threads: int = 1  # that prepare batches
    cache: str | None = None  # folder for indices of tars and sizes; None: the user's cache folder

    def __post_init__(self) -> None:
        one_of("data.kind", self.kind, DATA_FIELDS)
        in_range("data.seed", self.seed, 0, 2**31 - 1)
        one_of("data.variations", self.variations, VARIATIONS)  # divisors of a validation batch
        in_range("data.widest", self.widest, 1, 16)
        positive("data.cell", self.cell)
        one_of("data.crop", self.crop, ("centre", "random"))
        in_range("data.max_broken", self.max_broken, 0, 1)
        in_range("data.held_out", self.held_out, 1, 1 << 20)
        in_range("data.threads", self.threads, 0, 64)
        for field in dataclasses.fields(self):
            value, used = getattr(self, field.name), DATA_FIELDS[self.kind]
            if value != field.default and field.name not in used:
                raise InputError(
                    f"data.{field.name}: got {value!r}, expected it left out for data.kind "
                    f"{self.kind}"
                )
        if self.kind != "scenes" and self.path is None:
            raise InputError(f"data.path: got none, expected one for data.kind {self.kind}")
        if self.kind in PICTURES:
            side = positive("data.resolution", self.resolution or 0)
            if side % self.cell:
                raise InputError(
                    f"data.resolution: got {side}, expected a multiple of data.cell, {self.cell}"
                )
