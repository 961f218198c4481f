"""What of its memory a device says that it uses."""

import jax


def memory_use() -> dict[str, float]:
    """`hbm_peak_gb`, the most in use so far, and `hbm_share`, that share of what there is.

    Of the first device of this process; a CPU says nothing.
    """
    said = jax.local_devices()[0].memory_stats() or {}
    peak, limit = said.get("peak_bytes_in_use"), said.get("bytes_limit")
    if not peak or not limit:
        return {}
    return {"hbm_peak_gb": peak / 1e9, "hbm_share": peak / limit}
