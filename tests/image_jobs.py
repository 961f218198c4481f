"""Items of small jobs, and a job as a process: python image_jobs.py OUTPUT CONTAINER COUNT."""

import contextlib
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from jaxdiff.core.errors import WriteError
from jaxdiff.generation.open_output import open_output
from jaxdiff.generation.outputs import ImageItem

KEY = "0123456789abcdef"
PER_LINE = 2


def settings(index, number=0):
    return {
        "prompt": f"star {index}",
        "negative_prompt": None,
        "steps": 4,
        "sampler": "euler",
        "guidance_scale": 1.0,
        "seed": 10 * index + number,
        "width": 8,
        "height": 8,
        "model": "scenes",
    }


def item(index, number=0, count=1, **changes):
    values = {
        "index": index,
        "number": number,
        "count": count,
        "name": f"{index:06d}_star_{number}",
        "source": f"p.jsonl:{index + 1}",
        "custom_id": f"request-{index}",
        "seed": 10 * index + number,
        "image": np.full((8, 8, 3), (17 * index + number) % 256, np.uint8),
        "settings": settings(index, number),
    }
    return ImageItem(**values | changes)


@contextlib.contextmanager
def writing(output):
    """A function that writes an image in one of two threads; leaving closes the output."""
    try:
        with ThreadPoolExecutor(2) as pool:
            started = []
            yield lambda each: started.append(pool.submit(output.write, each))
        for each in started:
            each.result()
    except WriteError:
        output.abort()
        raise
    output.close()


def main(where, container, count):
    output = open_output(where, key=KEY, container=container, images_per_tar=20, prompts="in.jsonl")
    with writing(output) as write:
        print("begun", flush=True)
        for index in range(count):
            for number in range(PER_LINE):
                if not output.done(index, number):
                    write(item(index, number, PER_LINE))
                    time.sleep(0.002)
    assert "jax" not in sys.modules


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
