"""Batches: exact resume, the same for any threads and processes, clean exit, endless epochs."""

import json
import subprocess
import sys

import numpy as np
import pytest

from jaxdiff.core.errors import InputError
from jaxdiff.data.batches import batches, normalize_images
from jaxdiff.data.trained_tokenizer import train_tokenizer
from jaxdiff.scenes.source import SceneSource

SOURCE = SceneSource(seed=0)
TOKENIZER = train_tokenizer([SOURCE.example(i)[2] for i in range(60)])


def take(iterator, n):
    result = [next(iterator) for _ in range(n)]
    iterator.close()
    return result


def assert_same(a, b):
    assert len(a) == len(b)
    for left, right in zip(a, b, strict=True):
        assert left.keys() == right.keys()
        for name in left:
            np.testing.assert_array_equal(left[name], right[name])


def test_a_batch_is_what_training_wants():
    (batch,) = take(batches(SOURCE, batch_size=4, tokenizer=TOKENIZER), 1)
    assert batch["image"].shape == (4, 64, 64, 3)
    assert batch["image"].dtype == np.float32
    assert -1 <= batch["image"].min() < -0.5 < 0.5 < batch["image"].max() <= 1
    assert batch["ids"].shape == (4, 32)
    assert batch["ids"].dtype == np.int32
    np.testing.assert_array_equal(batch["image"][2], normalize_images(SOURCE[2]["image"]))
    assert take(batches(SOURCE, batch_size=4), 1)[0].keys() == {"image"}


@pytest.mark.parametrize("source", [SOURCE, [{"image": np.zeros((2, 2, 3), np.uint8)}]])
def test_batches_of_one_are_endless_too(source):
    found = take(batches(source, batch_size=1), 3)
    assert [batch["image"].shape[0] for batch in found] == [1, 1, 1]


def test_bytes_map_onto_the_unit_range():
    assert normalize_images(np.array([0, 255], np.uint8)).tolist() == [-1, 1]


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_threads_change_nothing(threads):
    expected = take(batches(SOURCE, batch_size=4, tokenizer=TOKENIZER, threads=0), 6)
    assert_same(
        take(batches(SOURCE, batch_size=4, tokenizer=TOKENIZER, threads=threads), 6), expected
    )


@pytest.mark.parametrize("seed", [None, 5])
def test_a_restored_state_continues_exactly(seed):
    options = {"batch_size": 4, "tokenizer": TOKENIZER, "seed": seed}
    iterator = batches(SOURCE, **options)
    for _ in range(3):
        next(iterator)
    state = json.loads(json.dumps(iterator.get_state()))
    expected = take(iterator, 3)
    resumed = batches(SOURCE, **options)
    next(resumed)
    resumed.set_state(state)
    assert_same(take(resumed, 3), expected)


def test_processes_share_the_global_batch():
    whole = take(batches(SOURCE, batch_size=8), 3)
    parts = [
        take(batches(SOURCE, batch_size=8, process_index=i, process_count=2), 3) for i in (0, 1)
    ]
    joined = [
        {"image": np.concatenate([a["image"], b["image"]])} for a, b in zip(*parts, strict=True)
    ]
    assert_same(joined, whole)


@pytest.mark.parametrize("processes", [1, 2])
def test_a_finite_source_is_read_anew_in_every_epoch(processes):
    numbers = list(range(13))
    shares = [
        take(
            batches(
                numbers,
                batch_size=4,
                seed=1,
                transform=lambda items: {"n": np.array(items)},
                process_index=i,
                process_count=processes,
            ),
            6,
        )
        for i in range(processes)
    ]
    read = [np.concatenate([batch["n"] for batch in step]) for step in zip(*shares, strict=True)]
    epochs = np.array(read).reshape(2, 12)
    assert all(len(set(epoch)) == 12 for epoch in epochs.tolist())
    assert epochs[0].tolist() != epochs[1].tolist()


def test_mistakes_are_named():
    with pytest.raises(InputError, match="multiple of 3"):
        batches(SOURCE, batch_size=4, process_count=3)
    with pytest.raises(InputError, match="at least 4"):
        batches([1, 2], batch_size=4)
    with pytest.raises(InputError, match="process_index"):
        batches(SOURCE, batch_size=4, process_index=1)


@pytest.mark.slow
def test_the_interpreter_exits_while_batches_are_read_ahead():
    code = (
        "from jaxdiff.data.batches import batches\n"
        "from jaxdiff.scenes.source import SceneSource\n"
        "iterator = batches(SceneSource(seed=0), batch_size=16, threads=2)\n"
        "print(next(iterator)['image'].shape)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == "(16, 64, 64, 3)\n"
    assert done.stderr == ""
