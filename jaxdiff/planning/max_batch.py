"""The largest batch that fits: memory is taken for linear in it, and the answer is compiled."""

from collections.abc import Callable

TRIES = 2  # compilations of the answer


def largest_batch(
    needed: Callable[[int], float], known: dict[int, float], limit: float, unit: int
) -> int:
    """The largest multiple of `unit` whose bytes are at most `limit`; 0 where none is.

    `known` has the bytes of some batches and gets those that are asked for. One more point gives a
    line; its answer is asked for, and once more where that does not fit.
    """

    def ask(batch: int) -> float:
        if batch not in known:
            known[batch] = needed(batch)
        return known[batch]

    (first,) = list(known)[:1]
    if len(known) < 2:
        # On the other side of the limit, as far as a unit allows.
        ask(2 * first if known[first] <= limit else max(unit, first // 2 // unit * unit))
    for _ in range(TRIES):
        low, high = min(known), max(known)
        if low == high:
            break
        slope = (known[high] - known[low]) / (high - low)
        fitting = [batch for batch, size in known.items() if size <= limit]
        above = [batch for batch, size in known.items() if size > limit]
        guess = int(low + (limit - known[low]) / max(slope, 1e-9)) // unit * unit
        guess = max(guess, *fitting, unit) if fitting else max(guess, unit)
        if above:
            guess = min(guess, min(above) - unit)
        if guess < unit or guess in known:
            break
        ask(guess)
    return max((batch for batch, size in known.items() if size <= limit), default=0)
