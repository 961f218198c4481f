"""Where captioned images come from: random access to their bytes, wherever these are stored.

A source has a length, a `fingerprint` of what it lists, and items `{"image": bytes, "caption":
str}`; an item that cannot be read raises BadSampleError. What is wrong in the listing itself is
left out of it and counted when the source is opened, so every process has the same items in the
same order.
"""

from typing import Protocol, TypedDict, runtime_checkable

from jaxdiff.core.types import Int, NDArray


class Record(TypedDict):
    """A captioned image as it is stored: an encoded image file."""

    image: bytes
    caption: str


@runtime_checkable
class ImageSource(Protocol):
    """Random access to captioned images."""

    @property
    def fingerprint(self) -> str:
        """Another one where the items or their order may be others."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record:
        """Item `index`; BadSampleError if it cannot be used."""
        ...

    def head(self, index: int, size: int) -> bytes:
        """At least the first `size` bytes of the image of item `index`, if it has as many."""
        ...


@runtime_checkable
class BlockSource(ImageSource, Protocol):
    """A source whose items are stored in blocks: reading one item reads the whole block."""

    block_starts: Int[NDArray, "_"]  # the first item of each block, and the number of items
    max_open_blocks: int  # blocks that may be read from at the same time
