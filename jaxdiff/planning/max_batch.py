"""The largest batch that fits: linear extrapolation of memory, then compilation."""

from collections.abc import Callable

TRIES = 2  # compilations of extrapolated batches


def max_batch_size(
    bytes_of: Callable[[int], float], measured: dict[int, float], limit: float, unit: int
) -> int:
    """The largest multiple of `unit` whose bytes are at most `limit`; 0 where none is.

    `measured` has the bytes of some batch sizes, and gets those that are tried. A second point
    gives a line; its answer is compiled, and once more if that does not fit.
    """

    def measure(batch: int) -> float:
        if batch not in measured:
            measured[batch] = bytes_of(batch)
        return measured[batch]

    (first,) = list(measured)[:1]
    if len(measured) < 2:
        # On the other side of the limit, as far as a unit allows.
        measure(2 * first if measured[first] <= limit else max(unit, first // 2 // unit * unit))
    for _ in range(TRIES):
        low, high = min(measured), max(measured)
        if low == high:
            break
        slope = (measured[high] - measured[low]) / (high - low)
        fitting = [batch for batch, size in measured.items() if size <= limit]
        above = [batch for batch, size in measured.items() if size > limit]
        guess = int(low + (limit - measured[low]) / max(slope, 1e-9)) // unit * unit
        guess = max(guess, *fitting, unit) if fitting else max(guess, unit)
        if above:
            guess = min(guess, min(above) - unit)
        if guess < unit or guess in measured:
            break
        measure(guess)
    return max((batch for batch, size in measured.items() if size <= limit), default=0)
