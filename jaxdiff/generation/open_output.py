"""Opening the output of a batch job."""

import pathlib

from jaxdiff.core.errors import InputError
from jaxdiff.core.validate import one_of
from jaxdiff.generation.openai_output import OpenAIOutput
from jaxdiff.generation.outputs import FolderOutput, Output
from jaxdiff.generation.places import LocalPlace, open_place
from jaxdiff.generation.shards import Shard
from jaxdiff.generation.tar_output import IMAGES, TarOutput

CONTAINERS = ("folder", "tar", "openai")


def open_output(
    where: str | pathlib.Path,
    *,
    key: str,
    shard: Shard | None = None,
    container: str = "folder",
    image_format: str = "png",
    quality: int | None = None,
    subfolders: bool = True,
    images_per_tar: int = IMAGES,
    bytes_per_tar: int | None = None,
    prompts: str | pathlib.Path | None = None,
) -> Output:
    """Where a shard of the job `key` writes its images: a folder at a path or a URL.

    `key` is a short hash of all options that matter for the images and of the prompt file, so that
    another job has another one. `container` is "folder" (a file for each image; without
    `subfolders` all in one folder), "tar" (webdataset) or "openai" (the output file of OpenAI's
    Batch API, named after the file `prompts`). `image_format` is png, webp, jpeg or latents,
    `quality` that of webp and jpeg, 0 to 100. InputError for a folder that another process writes
    as the same shard, or that holds the tars or output files of another job.
    """
    one_of("container", container, CONTAINERS)
    if not key.isalnum():
        raise InputError(f"key: got {key!r}, expected letters and digits")
    place, shard = open_place(where), shard or Shard()
    if container == "tar":
        return TarOutput(
            place,
            key,
            shard,
            image_format=image_format,
            quality=quality,
            images=images_per_tar,
            max_bytes=bytes_per_tar,
        )
    if container == "openai":
        if prompts is None:
            raise InputError("prompts: got none with the container openai, expected a file")
        name = str(prompts).rpartition("/")[2].removesuffix(".gz")
        stem = pathlib.PurePath(name).stem
        return OpenAIOutput(
            place, key, shard, stem=stem, image_format=image_format, quality=quality
        )
    return FolderOutput(
        place,
        key,
        shard,
        image_format=image_format,
        quality=quality,
        subfolders=subfolders,
        verify=isinstance(place, LocalPlace),
    )
