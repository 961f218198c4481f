"""What XLA is told: here, and by commands that tests start as processes of their own."""

import importlib.util
import os
import pathlib
import re
import subprocess
import sys

DEVICES = "--xla_force_host_platform_device_count"
# For programs that take longer to compile than to run: XLA's older way to write loops, without its
# optimisations twice as fast as the newer, and a program in one piece instead of 32.
QUICK = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"


def flags(devices: int) -> str:
    """XLA_FLAGS for so many CPU devices, on top of those that the environment has."""
    said = os.environ.get("XLA_FLAGS", "")
    if DEVICES in said:  # by the process that started this one
        return re.sub(rf"{DEVICES}=\d+", f"{DEVICES}={devices}", said)
    wanted = [said, f"{DEVICES}={devices}"]
    if os.environ.get("JAX_DISABLE_MOST_OPTIMIZATIONS") == "true" and _are_known(QUICK):
        wanted.append(QUICK)
    return " ".join(wanted).strip()


def _are_known(flags: str) -> bool:
    """Whether each XLA here has these: it ends a process that gives it a flag that it has not."""
    if importlib.util.find_spec("libtpu"):  # an XLA for TPUs alone
        return False
    environment = os.environ | {"XLA_FLAGS": flags}
    ask = [sys.executable, "-c", "import jax; jax.devices()"]
    return subprocess.run(ask, env=environment, capture_output=True, check=False).returncode == 0


def environment(devices: int, folder: pathlib.Path) -> dict[str, str]:
    """For a command on so many CPU devices; what it compiles is kept in `folder`."""
    return {
        **os.environ,
        "XLA_FLAGS": flags(devices),
        "JAX_COMPILATION_CACHE_DIR": str(folder / "cache"),
    }
