import pytest

from jaxdiff.core.errors import InputError
from jaxdiff.generation.shards import Shard, shard_from_environment


def test_a_shard_is_parsed_and_shown():
    assert Shard.parse("3/16") == Shard(3, 16)
    assert str(Shard(3, 16)) == "3/16"
    assert Shard(3, 16).label == "00003-of-00016"
    assert Shard(3, 16, unit_size=8).label == "00003-of-00016-by-8"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("16/16", r"^shard: got 16/16, expected an index from 0 to 15$"),
        ("0/0", r"^shard: got 0/0, expected at least 1 shard$"),
        ("3", r"^shard: got '3', expected INDEX/COUNT such as 3/16$"),
        ("-1/4", r"^shard: got '-1/4', expected INDEX/COUNT"),
        ("a/b", r"^shard: got 'a/b'"),
    ],
)
def test_what_is_no_shard(text, message):
    with pytest.raises(InputError, match=message):
        Shard.parse(text)


@pytest.mark.parametrize("count", [1, 3, 16])
@pytest.mark.parametrize("unit_size", [1, 64])
def test_each_line_has_one_owner_and_units_are_dealt_in_turn(count, unit_size):
    shards = [Shard(index, count, unit_size) for index in range(count)]
    for line in range(300):
        owners = [shard.index for shard in shards if shard.owns(line)]
        assert owners == [line // unit_size % count]


ARRAY = {
    "SLURM_ARRAY_TASK_ID": "5",
    "SLURM_ARRAY_TASK_MIN": "1",
    "SLURM_ARRAY_TASK_MAX": "8",
    "SLURM_ARRAY_TASK_COUNT": "8",
}
TASK = {"SLURM_PROCID": "2", "SLURM_NTASKS": "4", "SLURM_STEP_ID": "0"}
REPLICA = {"JOB_INDEX": "1", "REPLICATED_JOB_REPLICAS": "4"}
SLICE = {"TPU_WORKER_ID": "1", "TPU_WORKER_HOSTNAMES": "a,b,c,d"}


@pytest.mark.parametrize(
    ("environment", "count", "shard", "origin"),
    [
        (ARRAY, None, (4, 8), "SLURM_ARRAY_TASK_ID=5"),
        (ARRAY, 8, (4, 8), "SLURM_ARRAY_TASK_ID=5"),
        (
            {
                **ARRAY,
                "SLURM_ARRAY_TASK_MAX": "9",
                "SLURM_ARRAY_TASK_STEP": "2",
                "SLURM_ARRAY_TASK_COUNT": "5",
            },
            None,
            (2, 5),
            "SLURM_ARRAY_TASK_ID=5",
        ),
        (TASK, None, (2, 4), "SLURM_PROCID=2"),
        ({**ARRAY, **TASK}, None, (18, 32), "SLURM_ARRAY_TASK_ID=5, SLURM_PROCID=2"),
        ({"JOB_COMPLETION_INDEX": "3"}, 8, (3, 8), "JOB_COMPLETION_INDEX=3"),
        (
            {"JOB_COMPLETION_INDEX": "3", "JAXDIFF_NUM_SHARDS": "8"},
            None,
            (3, 8),
            "JOB_COMPLETION_INDEX=3",
        ),
        (
            {**REPLICA, "JOB_COMPLETION_INDEX": "3"},
            16,
            (7, 16),
            "JOB_INDEX=1, JOB_COMPLETION_INDEX=3",
        ),
        (REPLICA, None, (1, 4), "JOB_INDEX=1"),
        (SLICE, None, (1, 4), "TPU_WORKER_ID=1"),
        ({**SLICE, "JOB_COMPLETION_INDEX": "1"}, None, (1, 4), "TPU_WORKER_ID=1"),
        (
            {**SLICE, "MEGASCALE_SLICE_ID": "1", "MEGASCALE_NUM_SLICES": "2"},
            None,
            (5, 8),
            "MEGASCALE_SLICE_ID=1, TPU_WORKER_ID=1",
        ),
        (
            {"JAXDIFF_SHARD_INDEX": "2", "JAXDIFF_NUM_SHARDS": "3", **SLICE},
            None,
            (2, 3),
            "JAXDIFF_SHARD_INDEX=2",
        ),
    ],
)
def test_the_environment_of_launchers(environment, count, shard, origin):
    found = shard_from_environment(environment, count=count)
    assert found is not None
    assert (found.shard[:2], found.origin) == (shard, origin)


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"SLURM_NTASKS": "4", "SLURM_PROCID": "0"},  # the batch script, not a task of it
        {"SLURM_NTASKS": "1", "SLURM_PROCID": "0", "SLURM_STEP_ID": "0"},
        {"TPU_WORKER_ID": "0", "TPU_WORKER_HOSTNAMES": "localhost"},
        {"JOB_INDEX": "2"},
    ],
)
def test_environments_of_one_process(environment):
    assert shard_from_environment(environment) is None


@pytest.mark.parametrize(
    ("environment", "count", "message"),
    [
        (
            {"JOB_COMPLETION_INDEX": "3"},
            None,
            "INDEX=3 without the number of shards",
        ),
        ({"JOB_COMPLETION_INDEX": "8"}, 8, "INDEX=8: got 8/8, expected an index"),
        ({**ARRAY, "SLURM_ARRAY_TASK_COUNT": "3"}, None, "Slurm array of 3 tasks from 1 to 8"),
        (ARRAY, 16, "one of 8 shards, expected 16 of them"),
        ({"JOB_INDEX": "1", "JOB_COMPLETION_INDEX": "0"}, 4, "JOB_INDEX=1 without the number of"),
        ({**REPLICA, "JOB_COMPLETION_INDEX": "0"}, 6, "6 shards in 4 replicas"),
        ({"TPU_WORKER_ID": "x"}, None, "^TPU_WORKER_ID: got 'x', expected a whole number"),
    ],
)
def test_environments_that_contradict_themselves(environment, count, message):
    with pytest.raises(InputError, match=message):
        shard_from_environment(environment, count=count)
