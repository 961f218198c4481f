"""How fast training images are made: python benchmarks/scenes.py [--batch-size 64] [--threads 1]

Prints images per second for drawing alone and for finished batches, best of five runs each.
"""

import argparse
import time
from collections.abc import Callable

from jaxdiff.data.batches import batches
from jaxdiff.data.trained_tokenizer import train_tokenizer
from jaxdiff.scenes.source import SceneSource

IMAGES = 640


def best_rate(work: Callable[[], object], repeats: int = 5) -> float:
    """Images per second of the fastest of `repeats` runs of `work`, each IMAGES long."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return IMAGES / min(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    for variations in (1, 4):
        source = SceneSource(seed=0, variations=variations)
        tokenizer = train_tokenizer(source.example(i)[2] for i in range(1000))
        position = iter(range(10**9))
        drawn = best_rate(lambda s=source, p=position: [s[next(p)] for _ in range(IMAGES)])
        iterator = batches(
            source, batch_size=options.batch_size, tokenizer=tokenizer, threads=options.threads
        )
        steps = IMAGES // options.batch_size
        batched = best_rate(lambda i=iterator, n=steps: [next(i) for _ in range(n)])
        iterator.close()
        print(f"variations {variations}: {drawn:.0f} items/s, {batched:.0f} images/s in batches")


if __name__ == "__main__":
    main()
