"""Find and configure the compilers of chips that are not present."""

import os
from importlib import metadata

from packaging.requirements import Requirement

from jaxdiff.core.errors import InputError
from jaxdiff.nn.platforms import CUDA_PLUGINS, CUDNN, installed
from jaxdiff.parallel.chips import TPU, Chip

TPU_PACKAGES = ("libtpu", "flatbuffers")  # the compiler; kernels on their way to its other process
TPU_INSTALL = 'pip install "jax[tpu]" flatbuffers'
GPU_INSTALL = 'pip install "jax[cuda13]"'


def configure_compiler(chip: Chip, *, bundle_folder: str | None = None) -> None:
    """Find the compiler of `chip` and set what it would otherwise query from the machine.

    Call it before any device is used. The TPU compiler dumps its schedules (LLO bundles) to
    `bundle_folder`, if that is given. InputError if there is no compiler, or a libtpu of a version
    that JAX does not support.
    """
    if isinstance(chip, TPU):
        _check_libtpu()
        _configure_libtpu(chip, bundle_folder)
    else:
        _gpu_plugin()


def compiler_version(chip: Chip) -> str:
    """The package that compiles for `chip` and its version; other versions give other estimates."""
    name = "libtpu" if isinstance(chip, TPU) else _gpu_plugin().replace("_", "-")
    return f"{name} {metadata.version(name)}"


def _gpu_plugin() -> str:
    """The package that compiles for GPUs; InputError where it or cuDNN is missing."""
    found = [name for name in CUDA_PLUGINS if installed(name)]
    if not found or not installed(CUDNN):
        missing = CUDNN if found else CUDA_PLUGINS[0]
        raise InputError(f"plan: got no package {missing}, expected all of {GPU_INSTALL}")
    return found[0]


def _check_libtpu() -> None:
    """InputError unless libtpu is there in the version that JAX requires."""
    for name in TPU_PACKAGES:
        if not installed(name):
            raise InputError(f"plan: got no package {name}, expected all of {TPU_INSTALL}")
    found = metadata.version("libtpu")
    for wanted in map(Requirement, metadata.requires("jax") or ()):
        if wanted.name == "libtpu" and not wanted.specifier.contains(found, prereleases=True):
            raise InputError(
                f"plan: got libtpu {found}, expected {wanted.specifier} as jax "
                f"{metadata.version('jax')} asks for: {TPU_INSTALL}"
            )


def _configure_libtpu(chip: TPU, bundle_folder: str | None) -> None:
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # as many plans at a time as memory allows
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"
    os.environ["TPU_WORKER_HOSTNAMES"] = "localhost"
    os.environ["TPU_ACCELERATOR_TYPE"] = chip.accelerator
    if bundle_folder is None:
        return
    flags = {
        "xla_jf_dump_to": bundle_folder,
        "xla_jf_dump_llo_text": "true",
        "xla_jf_dump_hlo_text": "false",
        "xla_jf_dump_llo_pass_label_regex": "final_bundles",
    }
    existing = os.environ.get("LIBTPU_INIT_ARGS", "")
    more = " ".join(f"--{name}={value}" for name, value in flags.items())
    os.environ["LIBTPU_INIT_ARGS"] = (
        f"{existing} {more}".strip()
    )  # read when the compiler is loaded
