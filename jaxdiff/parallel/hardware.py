"""Peak FLOP/s of devices, for the utilisation."""

import jax

# Dense bfloat16 FLOP/s of one device by a part of its name, the first that is
# found: cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e} and NVIDIA's data sheets.
PEAK_FLOPS = {
    "TPU v5 lite": 197e12,
    "TPU v6 lite": 918e12,
    "TPU v5": 459e12,
    "TPU v4": 275e12,
    "H200": 989.5e12,
    "H100": 989.5e12,
    "A100": 312e12,
}


def peak_flops() -> float | None:
    """The peak FLOP/s of all devices together; None if the table does not have them."""
    kind = jax.devices()[0].device_kind
    found = next((flops for name, flops in PEAK_FLOPS.items() if name in kind), None)
    return None if found is None else found * jax.device_count()
