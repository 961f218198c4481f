"""The loop calls its hooks at the right steps, counts skipped ones and ends when they are many."""

import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.training.loop import (
    Hooks,
    Intervals,
    NonFiniteError,
    Prefetch,
    StoppedError,
    training_loop,
)
from jaxdiff.training.step import TrainState


class Ones:
    """An endless iterator of the number 1 that knows its position."""

    def __init__(self):
        self.made = 0

    def __next__(self):
        self.made += 1
        return {"x": np.ones(2, np.float32)}

    def get_state(self):
        return self.made


class Slow(Ones):
    """Takes a while for each number."""

    def __next__(self):
        time.sleep(0.05)
        return super().__next__()


class Record:
    """Hooks that note what they were called with."""

    def __init__(self, stop_after: int = 10**9):
        self.saved, self.logged, self.sampled, self.shown = [], {}, [], []
        self.stop_after = stop_after
        self.hooks = Hooks(
            save=lambda step, state, position: self.saved.append((step, int(state.step), position)),
            log=lambda step, values: self.logged.update({step: dict(values)}),
            sample=self.sample,
            progress=self.shown.append,
            stop=lambda: len(self.shown) >= self.stop_after,
        )

    def sample(self, step, state):
        self.sampled.append(step)
        return {"measure": 0.5}


def run(record: Record, *, steps=10, bad=(), start=0, numbers=Ones):
    state = TrainState(jnp.int32(start), {"w": jnp.float32(0)}, {"w": jnp.float32(0)}, ())

    def step(state, frozen, batch, base):
        new = state._replace(step=state.step + 1)
        loss = new.step.astype(jnp.float32)
        skipped = jnp.isin(new.step, jnp.asarray(bad, jnp.int32))
        loss = jnp.where(skipped, jnp.nan, loss)
        return new, {"loss": loss, "nonfinite_steps": skipped.astype(jnp.float32)}

    intervals = Intervals(steps=steps, log=4, checkpoint=3, sample=5, max_nonfinite_steps=3)
    with Prefetch(numbers(), lambda batch: batch) as ahead:
        return training_loop(
            jax.jit(step),
            state,
            {},
            ahead,
            jax.random.key(0),
            intervals=intervals,
            images_per_step=2,
            hooks=record.hooks,
        )


def test_hooks_are_called_at_their_steps():
    record = Record()
    final = run(record)
    assert int(final.step) == 10
    # step, the state's own count, the position of the data: all of the same moment
    assert record.saved == [(n, n, n) for n in (3, 6, 9, 10)]
    assert record.sampled == [5, 10]
    assert record.shown == list(range(1, 11))
    assert {n: v.get("loss") for n, v in record.logged.items()} == {
        4: 2.5,
        5: None,
        8: 6.5,
        10: 9.5,
    }
    assert record.logged[10]["measure"] == 0.5
    assert record.logged[8]["images_per_s"] > 0


def test_time_without_data_is_told():
    """The step takes next to nothing here, so data are nearly all that is waited for."""
    record = Record()
    run(record, numbers=Slow)
    assert 0.8 < record.logged[8]["data_wait"] < 1


def test_goes_on_where_the_state_is():
    record = Record()
    run(record, start=8)
    assert record.shown == [9, 10]


def test_nothing_is_left_to_do():
    record = Record()
    run(record, start=10)
    assert not record.shown
    assert not record.saved


def test_stopping_saves_the_step_it_stopped_at():
    record = Record(stop_after=7)
    with pytest.raises(StoppedError, match="after step 7"):
        run(record)
    assert record.saved[-1] == (7, 7, 7)


def test_skipped_steps_are_counted_and_left_out_of_the_means():
    record = Record()
    run(record, bad=(1, 2, 4, 6, 7, 9, 10))
    assert {
        n: (v["loss"], v["nonfinite_steps"]) for n, v in record.logged.items() if "loss" in v
    } == {
        4: (3.0, 3.0),
        8: (6.5, 2.0),
    }
    assert record.logged[10]["nonfinite_steps"] == 2
    assert [step for step, *_ in record.saved] == [3, 6, 9, 10]


@pytest.mark.parametrize("last", [3, 4, 5, 6, 7, 9])
def test_too_many_skipped_in_a_row_end_the_training(last):
    record = Record()
    bad = (*range(last - 2, last + 1), 10)
    with pytest.raises(NonFiniteError, match=f"steps {last - 2} to {last} were skipped: loss nan"):
        run(record, bad=bad)
    # noticed at the next log line, sample or checkpoint
    assert [step for step, *_ in record.saved] == [s for s in (3, 6, 9) if s < last]
