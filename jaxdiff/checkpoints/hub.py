"""Models of the Hugging Face Hub, through huggingface_hub and its cache."""

import pathlib
from collections.abc import Sequence

from jaxdiff.checkpoints.jsonfiles import read_object
from jaxdiff.checkpoints.weights import named_variants
from jaxdiff.core.errors import InputError

INDEX = "model_index.json"
CONFIG = "config.json"  # of a component
SETTINGS = (".json", ".txt", ".model")  # configs, vocabularies


def is_id(text: str) -> bool:
    """Whether `text` can be the name of a repository: owner/name."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(text)
    except HFValidationError:  # such as ./name, which is a path
        return False
    return text.count("/") == 1


def download(
    repository: str, *, variant: str | None = None, component: str | None = None
) -> pathlib.Path:
    """The local folder of a Hub repository with what a pipeline needs of it.

    Or what one `component` needs, such as "vae", which may be alone in it. Of the weights only the
    files that count are fetched: safetensors before other formats, of each component the `variant`
    where it has it. Without a connection the cache serves. Raises InputError if the repository
    cannot be had.
    """
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    huggingface_hub.logging.set_verbosity_error()  # retries would print over the one sentence
    try:
        names = huggingface_hub.list_repo_files(repository)
    except (HfHubHTTPError, HFValidationError) as error:
        raise InputError(
            f"model: got {repository} ({_first_line(error)}), expected a folder, a file or a "
            "repository of the Hub"
        ) from None
    except Exception:  # no connection, in any of the ways that the network library says it
        return _cached(repository)
    try:
        wanted = needed(names, variant, component)
        folder = huggingface_hub.snapshot_download(repository, allow_patterns=wanted)
        shards = _shards(pathlib.Path(folder), wanted)
        if shards:
            huggingface_hub.snapshot_download(repository, allow_patterns=shards)
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise InputError(
            f"model: got {repository} ({_first_line(error)}), expected one that can be downloaded"
        ) from None
    return pathlib.Path(folder)


def needed(names: Sequence[str], variant: str | None, component: str | None = None) -> list[str]:
    """The files of a repository to fetch: settings, and one format of each weights.

    Of a pipeline, or of one `component`, which may be alone in the repository.
    """
    folders: dict[str, list[str]] = {}
    for name in names:
        folder, _, file = name.rpartition("/")
        if "/" not in folder:  # components lie side by side
            folders.setdefault(folder, []).append(file)
    top = folders.pop("", [])
    if component is not None:
        if component not in folders and CONFIG not in top:
            raise InputError(
                f"{component}: got a repository without {component}/ or {CONFIG}, expected a VAE"
            )
        alone = component not in folders
        folders = {"": top} if alone else {component: folders[component]}
    elif INDEX not in top:
        raise InputError(f"model: got a repository without {INDEX}, expected a diffusers pipeline")
    wanted = [] if component else [name for name in (INDEX, "jaxdiff.json") if name in top]
    for folder, files in folders.items():
        found = named_variants(files)
        chosen = found.get(variant or "", found.get("", next(iter(found.values()), None)))
        settings = [f for f in files if f.endswith(SETTINGS) and ".index." not in f]
        place = f"{folder}/" if folder else ""
        wanted += [f"{place}{name}" for name in (*settings, *([chosen] if chosen else []))]
    return wanted


def _shards(folder: pathlib.Path, fetched: Sequence[str]) -> list[str]:
    """The files that the indices among `fetched` name."""
    found = []
    for name in fetched:
        if ".index." in name:
            table = read_object(folder / name).get("weight_map", {})
            place = name.removesuffix(name.rpartition("/")[2])
            found += sorted({f"{place}{shard}" for shard in table.values()})
    return found


def _cached(repository: str) -> pathlib.Path:
    """The folder of an earlier download; InputError if there was none."""
    import huggingface_hub
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return pathlib.Path(huggingface_hub.snapshot_download(repository, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError, OSError):
        raise InputError(
            f"model: got {repository} (no such folder here, no connection to the Hub, not in its "
            "cache), expected a diffusers folder, a checkpoint file or a Hub repository"
        ) from None


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
