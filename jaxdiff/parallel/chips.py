"""The data of TPU chips and GPUs: for compilers, estimates and the utilisation (MFU).

Peak, memory, bandwidth and links of TPUs are those of cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e}.
The clock turns the compiler's cycles into seconds. That of v4 is published (2304.01433, table 4);
of the others it is the peak divided by the FLOPs that all matrix units do in a cycle: 4 units of
128 x 128 in each core of v5e (1 core) and v5p (2), 4 x 256 x 256 for v6e. A product of 8192 x 8192
matrices is then estimated to reach 88% of the peak on v5e, 90% on v5p and v4 and 70% on v6e.

Of GPUs, those in one machine with NVLink, they are those of NVIDIA's data sheets (links: one way);
the other attributes are as reported by the CUDA driver.
"""

import dataclasses
import os
from typing import ClassVar

import jax

GIB = 2**30
SCOPED_MEMORY = "xla_tpu_scoped_vmem_limit_kib"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """One TPU chip or GPU."""

    platform: ClassVar[str]  # as JAX calls it
    unit_name: ClassVar[str]

    kind: str  # part of JAX's `device_kind`
    memory: float  # bytes
    peak_flops: float  # bfloat16 FLOP/s
    bandwidth: float  # bytes/s of its memory
    link: float  # bytes/s to all neighbours together
    dimensions: int  # of the grids of these chips

    @property
    def hbm(self) -> float:
        """Bytes available to a program."""
        return self.memory


@dataclasses.dataclass(frozen=True, kw_only=True)
class TPU(Chip):
    """One TPU chip; its memory is what the compiler allows a program."""

    platform = "tpu"
    unit_name = "chip"

    clock: float  # Hz
    cores: int  # per device; they share a kernel's steps
    accelerator: str  # TPU_ACCELERATOR_TYPE of one host
    options: dict[str, str] = dataclasses.field(default_factory=dict)  # of the topology
    # KiB of fast memory for an operation of a transformer, whose wide products are cut into fewer
    # pieces then; None: XLA's default, which is best for a UNet
    transformer_memory: int | None = None

    @property
    def transformer_options(self) -> dict[str, str]:
        """What a transformer is compiled with, where LIBTPU_INIT_ARGS does not say it."""
        given = SCOPED_MEMORY in os.environ.get("LIBTPU_INIT_ARGS", "")
        memory = self.transformer_memory
        return {} if given or memory is None else {SCOPED_MEMORY: f"{memory}"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class GPU(Chip):
    """One NVIDIA GPU."""

    platform = "cuda"
    unit_name = "GPU"
    max_devices: ClassVar[int] = 8  # in one machine

    dimensions: int = 1
    name: str
    capability: int  # the major number: 9 is Hopper's
    multiprocessors: int  # streaming multiprocessors
    float32_lanes: int  # float32 units in each
    clock: float  # Hz
    cache: int  # bytes of the L2 cache
    shared_memory: int  # bytes of shared memory in each multiprocessor

    @property
    def hbm(self) -> float:
        """Three quarters of the memory, as in JAX, or the fraction XLA_CLIENT_MEM_FRACTION."""
        fraction = os.environ.get("XLA_CLIENT_MEM_FRACTION")
        return self.memory * (float(fraction) if fraction else 0.75)

    def target_config(self) -> str:
        """XLA's target config: a GpuTargetConfigProto as text."""
        device = {
            "threads_per_block_limit": 1024,
            "threads_per_warp": 32,
            "threads_per_core_limit": 2048,
            "registers_per_core_limit": 2**16,
            "registers_per_block_limit": 2**16,
            "shared_memory_per_block": 48 * 2**10,
            "shared_memory_per_block_optin": self.shared_memory - 2**10,
            "shared_memory_per_core": self.shared_memory,
            "block_dim_limit_x": 2**31 - 1,
            "block_dim_limit_y": 2**16 - 1,
            "block_dim_limit_z": 2**16 - 1,
            "core_count": self.multiprocessors,
            "fpus_per_core": self.float32_lanes,
            "clock_rate_ghz": self.clock / 1e9,
            "l2_cache_size": self.cache,
            "memory_bandwidth": int(self.bandwidth),
            "device_memory_size": int(self.memory),
        }
        attributes = " ".join(f"{name}: {value}" for name, value in device.items())
        return (
            f"gpu_device_info {{ {attributes} cuda_compute_capability {{ major: {self.capability} "
            f"}} }} platform_name: 'CUDA' device_description_str: '{self.name}' "
            "dnn_version_info { major: 9 minor: 10 } runtime_version { major: 12 minor: 8 }"
        )


H100 = GPU(
    kind="H100",
    name="NVIDIA H100 80GB HBM3",
    memory=84_942_979_072,
    peak_flops=989.5e12,
    bandwidth=3352e9,
    link=450e9,
    capability=9,
    multiprocessors=132,
    float32_lanes=128,
    clock=1.98e9,
    cache=50 * 2**20,
    shared_memory=228 * 2**10,
)

CHIPS: dict[str, Chip] = {
    "v4": TPU(
        kind="TPU v4",
        memory=30.75 * GIB,
        peak_flops=275e12,
        clock=1.05e9,
        bandwidth=1228e9,
        link=300e9,
        cores=2,
        dimensions=3,
        accelerator="v4-8",
        options={"chip_config_name": "megacore"},
    ),
    "v5e": TPU(
        kind="TPU v5 lite",
        memory=15.75 * GIB,
        peak_flops=197e12,
        clock=1.5e9,
        bandwidth=819e9,
        link=200e9,
        cores=1,
        dimensions=2,
        accelerator="v5litepod-4",
        transformer_memory=2**16,
    ),
    "v5p": TPU(
        kind="TPU v5",
        memory=95.73 * GIB,
        peak_flops=459e12,
        clock=1.75e9,
        bandwidth=2765e9,
        link=600e9,
        cores=2,
        dimensions=3,
        accelerator="v5p-8",
        transformer_memory=2**16,
    ),
    "v6e": TPU(
        kind="TPU v6 lite",
        memory=31.24 * GIB,
        peak_flops=918e12,
        clock=1.75e9,
        bandwidth=1640e9,
        link=448e9,
        cores=1,
        dimensions=2,
        accelerator="v6e-4",
        transformer_memory=2**16,
    ),
    "a100": GPU(
        kind="A100",
        name="NVIDIA A100-SXM4-80GB",
        memory=85_100_068_864,
        peak_flops=312e12,
        bandwidth=2039e9,
        link=300e9,
        capability=8,
        multiprocessors=108,
        float32_lanes=64,
        clock=1.41e9,
        cache=40 * 2**20,
        shared_memory=164 * 2**10,
    ),
    "h100": H100,
    "h200": dataclasses.replace(
        H100, kind="H200", name="NVIDIA H200", memory=151_397_597_184, bandwidth=4800e9
    ),
}


def _chip_of(device_kind: str) -> Chip | None:
    """The chip in the table; None if that does not have it."""
    # The longest name is meant: "TPU v5" is in "TPU v5 lite" too.
    fitting = [chip for chip in CHIPS.values() if chip.kind in device_kind]
    return max(fitting, key=lambda chip: len(chip.kind), default=None)


def peak_flops() -> float | None:
    """The peak bfloat16 FLOP/s of all devices together; None if the table does not have them."""
    chip = _chip_of(jax.devices()[0].device_kind)
    return None if chip is None else chip.peak_flops * jax.device_count()


def compiler_options(device_kind: str, *, transformer: bool) -> dict[str, str]:
    """What XLA is given for a program of a network, or of a `transformer`, on such devices."""
    chip = _chip_of(device_kind)
    return chip.transformer_options if transformer and isinstance(chip, TPU) else {}
