"""TPU chips as data: what one has, and what its compiler has to be told of it.

Peak, memory, bandwidth and links are those of cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e}. The clock
turns the compiler's cycles into seconds. That of v4 is published (2304.01433, table 4); of the
others it is the peak divided by the FLOPs that all matrix units do in a cycle: 4 units of 128 x 128
in each core of v5e (1 core) and v5p (2), 4 x 256 x 256 for v6e. A product of 8192 x 8192 matrices
is then estimated to reach 88% of the peak on v5e, 90% on v5p and v4 and 70% on v6e.
"""

import dataclasses

GIB = 2**30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """One TPU chip."""

    hbm: float  # bytes that the compiler gives to a program, a little below what is there
    peak: float  # bfloat16 FLOP/s
    clock: float  # Hz
    bandwidth: float  # bytes/s of its memory
    link: float  # bytes/s between a chip and all of its neighbours together
    cores: int  # that work as one device, each with half of a kernel's steps
    dimensions: int  # of the torus
    accelerator: str  # TPU_ACCELERATOR_TYPE of one host
    options: dict[str, str] = dataclasses.field(default_factory=dict)  # of the topology


CHIPS: dict[str, Chip] = {
    "v4": Chip(
        hbm=30.75 * GIB,
        peak=275e12,
        clock=1.05e9,
        bandwidth=1228e9,
        link=300e9,
        cores=2,
        dimensions=3,
        accelerator="v4-8",
        options={"chip_config_name": "megacore"},
    ),
    "v5e": Chip(
        hbm=15.75 * GIB,
        peak=197e12,
        clock=1.5e9,
        bandwidth=819e9,
        link=200e9,
        cores=1,
        dimensions=2,
        accelerator="v5litepod-4",
    ),
    "v5p": Chip(
        hbm=95.73 * GIB,
        peak=459e12,
        clock=1.75e9,
        bandwidth=2765e9,
        link=600e9,
        cores=2,
        dimensions=3,
        accelerator="v5p-8",
    ),
    "v6e": Chip(
        hbm=31.24 * GIB,
        peak=918e12,
        clock=1.75e9,
        bandwidth=1640e9,
        link=448e9,
        cores=1,
        dimensions=2,
        accelerator="v6e-4",
    ),
}
