"""The persistent compilation cache: what was compiled once is loaded by the next process."""

import os
import pathlib

import jax


def enable() -> None:
    """Keep compiled programs in the user's cache folder, unless the user chose another one.

    `JAX_COMPILATION_CACHE_DIR` and `JAX_ENABLE_COMPILATION_CACHE=false` keep their meaning.
    """
    if jax.config.jax_compilation_cache_dir is None:  # pyright: ignore[reportAttributeAccessIssue]
        base = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
        jax.config.update("jax_compilation_cache_dir", str(pathlib.Path(base) / "jaxdiff" / "xla"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
