"""Endless samples along a plan, with a substitute for each that is broken.

The rule for a broken item: the next one of its group in the order of the source takes its place,
with the crop and the flip that are drawn for the place. It depends on the item alone, so every
process finds the same without asking the others; batches keep their shape and their number, and all
whole items are still seen at their own places. The substitute is seen once more in that epoch.
"""

from collections.abc import Callable, Sequence
from typing import SupportsIndex

import numpy as np

from jaxdiff.core.errors import InputError
from jaxdiff.core.validate import one_of
from jaxdiff.data.batches import Item
from jaxdiff.data.pictures import CROPS, draws, prepare
from jaxdiff.data.plan import LENGTH, Place, Plan
from jaxdiff.data.scenes import SceneSource
from jaxdiff.data.skipped import BrokenError, Skipped
from jaxdiff.data.sources import PictureSource

Make = Callable[[int, Place], Item]


class Samples:
    """Random access to the samples at the places of `plan`.

    `make` gives the sample of an item at a place, or raises BrokenError, which `skipped` counts.
    """

    def __init__(self, plan: Plan, make: Make, skipped: Skipped) -> None:
        self._plan, self._make, self.skipped = plan, make, skipped

    def __len__(self) -> int:
        return LENGTH

    def __getitem__(self, number: SupportsIndex) -> Item:
        place = self._plan[number.__index__()]
        for after in range(self._plan.choices(place)):
            self.skipped.seen()
            try:
                return self._make(self._plan.item(place, after), place)
            except BrokenError as error:
                self.skipped.broken(str(error))
        raise InputError(f"data: got {self._plan.choices(place)} items, expected one that is whole")

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._plan.batches} batches in an epoch)"


def picture_maker(
    source: PictureSource,
    sizes: Sequence[tuple[int, int]],
    *,
    seed: int = 0,
    crop: str = "centre",
    flip: bool = False,
) -> Make:
    """Samples {"image", "caption", "time_ids"} of `source`, those of group g of size `sizes[g]`.

    Crop and flip are drawn from (seed, epoch, group, position) alone.
    """
    one_of("crop", crop, CROPS)

    def make(index: int, place: Place) -> Item:
        record = source[index]
        how = draws((seed, *place), crop=crop, flip=flip)
        prepared = prepare(record["picture"], sizes[place.group], how)
        return {**prepared._asdict(), "caption": record["caption"]}

    return make


def scene_maker(source: SceneSource) -> Make:
    """Samples {"image", "caption", "time_ids"} of scenes, whole and in their own size."""
    sizes = np.array([source.size, source.size, 0, 0, source.size, source.size], np.int32)

    def make(index: int, place: Place) -> Item:
        del place
        scene = source[index]
        return {"image": scene["image"], "caption": scene["caption"], "time_ids": sizes}

    return make
