"""The persistent compilation cache: what was compiled once is loaded by the next process."""

import contextlib
import os
import pathlib
import zlib

import jax

ENTRIES = "*-" + "[0-9a-f]" * 64 + "-cache"
ZSTANDARD = b"\x28\xb5\x2f\xfd"  # how an entry begins where that package is installed; else zlib's


def enable() -> None:
    """Keep compiled programs in the user's cache folder, unless the user chose another one.

    `JAX_COMPILATION_CACHE_DIR` and `JAX_ENABLE_COMPILATION_CACHE=false` keep their meaning.
    """
    if jax.config.jax_compilation_cache_dir is None:  # pyright: ignore[reportAttributeAccessIssue]
        base = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
        jax.config.update("jax_compilation_cache_dir", str(pathlib.Path(base) / "jaxdiff" / "xla"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def prune_corrupt() -> None:
    """Remove programs that were cut off while they were written, by a kill or a full disk.

    JAX writes them in place, and neither reads nor replaces what it finds cut off.
    """
    folder = jax.config.jax_compilation_cache_dir  # pyright: ignore[reportAttributeAccessIssue]
    for path in pathlib.Path(folder).glob(ENTRIES) if folder else ():
        with contextlib.suppress(OSError):  # of another process that mends, or not ours
            if not _whole(path.read_bytes()):
                path.unlink()


def _whole(data: bytes) -> bool:
    if data.startswith(ZSTANDARD):
        return True
    stream = zlib.decompressobj()
    with contextlib.suppress(zlib.error):
        stream.decompress(data)
    return stream.eof
