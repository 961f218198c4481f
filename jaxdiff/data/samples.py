"""Endless samples in the order of a sampler, with a substitute for each bad one.

The rule for a broken item: the next one of its group in the order of the source takes its place,
with the crop and the flip that are drawn for the place. It depends on the item alone, so every
process finds the same without asking the others; batches keep their shape and their number, and all
whole items are still seen at their own places. The substitute is seen once more in that epoch.
"""

from collections.abc import Callable, Sequence
from typing import SupportsIndex

from jaxdiff.core.errors import InputError
from jaxdiff.core.validate import one_of
from jaxdiff.data.bad_samples import BadSampleCounter, BadSampleError
from jaxdiff.data.batches import Item
from jaxdiff.data.preprocessing import CROPS, resize_and_crop, sample_augmentation
from jaxdiff.data.sampling_order import LENGTH, IndexSampler, SamplePosition
from jaxdiff.data.sources import ImageSource

Make = Callable[[int, SamplePosition], Item]


class MapDataset:
    """Random access to the samples at the positions of `plan`; errors call them `name`.

    `make` gives the sample of an item at a position, or raises BadSampleError, which
    `bad_samples` counts.
    """

    def __init__(
        self,
        plan: IndexSampler,
        make: Make,
        bad_samples: BadSampleCounter,
        name: str = "data",
    ) -> None:
        self._plan, self._make, self.bad_samples, self._name = plan, make, bad_samples, name

    def __len__(self) -> int:
        return LENGTH

    def __getitem__(self, number: SupportsIndex) -> Item:
        position = self._plan[number.__index__()]
        for after in range(self._plan.choices(position)):
            self.bad_samples.seen()
            try:
                return self._make(self._plan.item(position, after), position)
            except BadSampleError as error:
                self.bad_samples.broken(str(error), where=error.where)
        raise InputError(
            f"{self._name}: got {self._plan.choices(position)} unreadable items in a row "
            f"({self.bad_samples.reasons()}), expected a readable one"
        )

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._plan.batches} batches in an epoch)"


def make_transform(
    source: ImageSource,
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

    def make(index: int, place: SamplePosition) -> Item:
        record = source[index]
        how = sample_augmentation((seed, *place), crop=crop, flip=flip)
        prepared = resize_and_crop(record["image"], sizes[place.group], how)
        return {**prepared._asdict(), "caption": record["caption"]}

    return make
