"""Shards of a prompt file: which of its lines a process generates, and how it finds that out.

Lines are dealt in units of consecutive ones: unit j belongs to shard j % count. So every shard has
lines from all over the file, and neighbours, which often are alike, stay together.
"""

import os
from collections.abc import Mapping
from typing import NamedTuple

from jaxdiff.core.errors import InputError

UNIT_SIZE = 64  # lines
COUNT_VARIABLE = "JAXDIFF_NUM_SHARDS"
INDEX_VARIABLE = "JAXDIFF_SHARD_INDEX"
# What manifests call the labels of a JobSet that they pass on; the first that is set counts.
JOB_INDEX = ("JOB_INDEX", "JOBSET_JOB_INDEX")  # jobset.sigs.k8s.io/job-index
JOB_REPLICAS = (  # jobset.sigs.k8s.io/replicatedjob-replicas
    *("REPLICATED_JOB_REPLICAS", "JOBSET_REPLICATEDJOB_REPLICAS", "JOB_REPLICAS"),
)


class Shard(NamedTuple):
    """Shard `index` (from 0) of `count`, in units of `unit_size` lines."""

    index: int = 0
    count: int = 1
    unit_size: int = UNIT_SIZE

    @classmethod
    def parse(cls, text: str) -> "Shard":
        """The shard in INDEX/COUNT, such as 3/16; InputError unless 0 <= INDEX < COUNT."""
        index, slash, count = (part.strip() for part in text.partition("/"))
        if not (slash and index.isdecimal() and count.isdecimal()):
            raise InputError(f"shard: got {text!r}, expected INDEX/COUNT such as 3/16")
        return cls.of(int(index), int(count), "shard")

    @classmethod
    def of(cls, index: int, count: int, name: str) -> "Shard":
        """Shard `index` of `count`; an InputError begins with `name`."""
        if count < 1:
            raise InputError(f"{name}: got {index}/{count}, expected at least 1 shard")
        if not 0 <= index < count:
            raise InputError(
                f"{name}: got {index}/{count}, expected an index from 0 to {count - 1}"
            )
        return cls(index, count)

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    @property
    def label(self) -> str:
        """The shard in names of files: 00003-of-00016, and the size of units if it is unusual."""
        layout = "" if self.unit_size == UNIT_SIZE else f"-by-{self.unit_size}"
        return f"{self.index:05d}-of-{self.count:05d}{layout}"

    def owns(self, line: int) -> bool:
        """Whether the line with this index (from 0) is one of the shard's."""
        return line // self.unit_size % self.count == self.index


class FoundShard(NamedTuple):
    """The shard that the environment gives to this process, and the variables that say so."""

    shard: Shard
    origin: str  # such as "SLURM_ARRAY_TASK_ID=3"


def shard_from_environment(
    environment: Mapping[str, str] | None = None, *, count: int | None = None
) -> FoundShard | None:
    """The shard that a launcher gives to this process; None where there is none.

    The first of these counts:

    - JAXDIFF_SHARD_INDEX with JAXDIFF_NUM_SHARDS: any launcher;
    - SLURM_ARRAY_TASK_ID with its MIN, MAX, STEP and COUNT, times the tasks of a step;
    - SLURM_PROCID of a step that srun started, with the number of its tasks. The batch script
      itself is no step, whatever SLURM_NTASKS says;
    - JOB_COMPLETION_INDEX of an Indexed Job of Kubernetes. Kubernetes does not pass on how many
      there are: `count` or JAXDIFF_NUM_SHARDS says it. In a JobSet with several replicas, pass on
      the labels `job-index` and `replicatedjob-replicas` as JOB_INDEX and REPLICATED_JOB_REPLICAS;
      then the shard is JOB_INDEX * (count / replicas) + JOB_COMPLETION_INDEX, or JOB_INDEX alone
      without a completion index;
    - TPU_WORKER_ID with TPU_WORKER_HOSTNAMES, times the slices of MEGASCALE_NUM_SLICES.

    `count` is the number of shards that the user asks for (None: the launcher's). InputError for
    variables that contradict it or one another.
    """
    env = os.environ if environment is None else environment
    asked = count if count is not None else _number(env, COUNT_VARIABLE)
    for find in (_explicit, _slurm, _kubernetes, _tpu):
        found = find(env, asked)
        if found is not None:
            shard, origin = found
            if asked is not None and shard.count != asked:
                raise InputError(
                    f"shard: got {origin}, which is one of {shard.count} shards, "
                    f"expected {asked} of them"
                )
            return found
    return None


def _explicit(env: Mapping[str, str], count: int | None) -> FoundShard | None:
    index = _number(env, INDEX_VARIABLE)
    if index is None:
        return None
    return _found(index, _needed(env, INDEX_VARIABLE, count), env, INDEX_VARIABLE)


def _slurm(env: Mapping[str, str], count: int | None) -> FoundShard | None:
    del count
    task, tasks = 0, 1
    names: list[str] = []
    in_step = any(name in env for name in ("SLURM_STEP_ID", "SLURM_STEPID", "SLURM_STEP_NUM_TASKS"))
    of_step = _number(env, "SLURM_STEP_NUM_TASKS")
    number = of_step if of_step is not None else _number(env, "SLURM_NTASKS")
    rank = _number(env, "SLURM_PROCID")
    if in_step and rank is not None and number is not None and number > 1:
        task, tasks = rank, number
        names.append("SLURM_PROCID")
    element = _number(env, "SLURM_ARRAY_TASK_ID")
    if element is None:
        return _found(task, tasks, env, *names) if names else None
    first = _number_or(env, "SLURM_ARRAY_TASK_MIN", 0)
    step = max(_number_or(env, "SLURM_ARRAY_TASK_STEP", 1), 1)
    last = _number_or(env, "SLURM_ARRAY_TASK_MAX", element)
    assumed = (last - first) // step + 1
    elements = _number_or(env, "SLURM_ARRAY_TASK_COUNT", assumed)
    if elements != assumed or (element - first) % step:
        raise InputError(
            f"shard: got a Slurm array of {elements} tasks from {first} to {last}, "
            "expected consecutive ones; --shard INDEX/COUNT names a shard by itself"
        )
    index = (element - first) // step * tasks + task
    return _found(index, elements * tasks, env, "SLURM_ARRAY_TASK_ID", *names)


def _kubernetes(env: Mapping[str, str], count: int | None) -> FoundShard | None:
    completion = "JOB_COMPLETION_INDEX"
    pod = _number(env, completion)
    job_name = next((name for name in JOB_INDEX if name in env), None)
    replicas_name = next((name for name in JOB_REPLICAS if name in env), None)
    job = None if job_name is None else _number(env, job_name)
    replicas = None if replicas_name is None else _number(env, replicas_name)
    if pod is None and (job is None or replicas is None):
        return None
    if job is None or job_name is None or (replicas is None and job == 0 and pod is not None):
        if count is None and len(_hosts(env)) > 1:
            return None  # of a slice of TPUs, whose hosts are known
        return _found(pod or 0, _needed(env, completion, count), env, completion)
    if replicas is None:
        raise InputError(
            f"shard: got {job_name}={job} without the number of replicas, "
            f"expected it in {JOB_REPLICAS[0]}"
        )
    if pod is None:
        return _found(job, replicas, env, job_name)
    total = _needed(env, completion, count)
    if replicas < 1 or total % replicas:
        raise InputError(
            f"shard: got {total} shards in {replicas} replicas, expected a multiple of {replicas}"
        )
    return _found(job * (total // replicas) + pod, total, env, job_name, completion)


def _tpu(env: Mapping[str, str], count: int | None) -> FoundShard | None:
    del count
    worker, hosts = _number(env, "TPU_WORKER_ID"), len(_hosts(env))
    slices = _number_or(env, "MEGASCALE_NUM_SLICES", 1)
    if worker is None or hosts * slices < 2:
        return None
    names = ("MEGASCALE_SLICE_ID", "TPU_WORKER_ID") if slices > 1 else ("TPU_WORKER_ID",)
    index = _number_or(env, "MEGASCALE_SLICE_ID", 0) * hosts + worker
    return _found(index, hosts * slices, env, *names)


def _hosts(env: Mapping[str, str]) -> list[str]:
    return [name for name in env.get("TPU_WORKER_HOSTNAMES", "").split(",") if name.strip()]


def _found(index: int, count: int, env: Mapping[str, str], *names: str) -> FoundShard:
    origin = ", ".join(f"{name}={env[name]}" for name in names)
    return FoundShard(Shard.of(index, count, f"shard: {origin}"), origin)


def _needed(env: Mapping[str, str], name: str, count: int | None) -> int:
    if count is None:
        raise InputError(
            f"shard: got {name}={env[name]} without the number of shards, "
            f"expected it in {COUNT_VARIABLE}"
        )
    return count


def _number(env: Mapping[str, str], name: str) -> int | None:
    """The variable as a whole number; None where it is not set."""
    text = env.get(name, "").strip()
    if text and not text.isdecimal():
        raise InputError(f"{name}: got {text!r}, expected a whole number")
    return int(text) if text else None


def _number_or(env: Mapping[str, str], name: str, default: int) -> int:
    number = _number(env, name)
    return default if number is None else number
