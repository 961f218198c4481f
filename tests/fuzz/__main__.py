"""Odd and broken inputs: no traceback, no hang, no image that is black without a word.

    PYTHONPATH=.:tests python -m fuzz --inputs 10000 --seed 0

runs them in processes of their own and prints a table; `--only INDEX` repeats one of them.
"""

import argparse
import collections
import contextlib
import io
import json
import os
import pathlib
import selectors
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

LIMIT_S = 10  # of processor time, for one input: the machine may be busy
STUCK_S = 180  # after which the process of one that waits or does not react to a signal is killed
ROOT = pathlib.Path(__file__).parents[2]


class HangError(BaseException):
    """An input has taken LIMIT_S seconds of processor time."""


def attempt(index: int, seed: int) -> dict[str, Any]:
    """What one input leads to: accepted, refused, or the traceback of what must not happen."""
    import numpy as np

    from fuzz.targets import TARGETS
    from jaxdiff.core.errors import InputError
    from jaxdiff.pipeline.nonfinite import NonFiniteImageError

    name = list(TARGETS)[index % len(TARGETS)]
    result, error, started = "accepted", "", time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, _limit():
        try:
            TARGETS[name](np.random.default_rng([seed, index]), pathlib.Path(folder))
        except InputError as refusal:
            result, error = "refused", str(refusal)
            if not error.strip() or len(error.splitlines()) > 1:
                result, error = "failed", f"a refusal that is not one sentence: {error!r}"
        except NonFiniteImageError as refusal:
            result, error = "refused", str(refusal)
        except OSError as error_:  # which the commands say in a sentence, too
            result = "failed" if error_.filename is None else "refused"
            error = traceback.format_exc()
        except SystemExit as exit_:
            result = "refused" if exit_.code in (0, 2) else "failed"
        except HangError:
            result, error = "failed", f"took more than {LIMIT_S} s\n{traceback.format_exc()}"
        except Exception:
            result, error = "failed", traceback.format_exc()
    seconds = time.perf_counter() - started
    return {"index": index, "target": name, "result": result, "s": seconds, "error": error}


@contextlib.contextmanager
def _limit() -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise HangError

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, LIMIT_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def work(indices: Iterable[int], seed: int) -> None:
    """Attempt inputs; a line for each before and after it, on what was stdout."""
    lines = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # libraries write there, too
    warnings.simplefilter("ignore")
    from fuzz.targets import bases, pipe

    bases()
    pipe().resolve("a star")
    for index in indices:
        lines.write(json.dumps({"begin": index}) + "\n")
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            outcome = attempt(index, seed)
        lines.write(json.dumps(outcome) + "\n")


class Worker:
    """A process that attempts indices from a list, started again where it dies or hangs."""

    def __init__(self, indices: Sequence[int], seed: int) -> None:
        self.left, self.seed, self.current = list(indices), seed, None
        self.start()

    def start(self) -> None:
        """Start a process for what is left."""
        stderr, self.stderr = tempfile.mkstemp()
        command = [sys.executable, "-m", "fuzz", "--seed", str(self.seed), "--indices"]
        self.process = subprocess.Popen(
            [*command, ",".join(map(str, self.left))],
            stdout=subprocess.PIPE,
            stderr=stderr,
            cwd=ROOT,
        )
        os.close(stderr)
        self.heard = time.monotonic() + STUCK_S  # it begins with imports

    def kill(self) -> dict[str, Any]:
        """End a process that hangs or has died: the outcome of the input that it was at."""
        self.process.kill()
        self.process.communicate()
        stderr = pathlib.Path(self.stderr).read_bytes()
        code = self.process.returncode
        if self.current is None:
            raise RuntimeError(f"the process ended with {code} before its first input: {stderr!r}")
        self.left.remove(self.current)
        error = f"the process ended with {code}: {stderr[-2000:].decode(errors='replace')}"
        outcome = {"index": self.current, "target": "", "result": "failed", "s": 0, "error": error}
        self.current = None
        return outcome


def run(indices: Sequence[int], seed: int, workers: int) -> Iterator[dict[str, Any]]:
    """The outcomes of inputs, as they come."""
    shares = [indices[i::workers] for i in range(workers)]
    running = [Worker(share, seed) for share in shares if share]
    with selectors.DefaultSelector() as selector:
        for worker in running:
            selector.register(worker.process.stdout, selectors.EVENT_READ, worker)
        while running:
            for key, _ in selector.select(timeout=1):
                worker, line = key.data, key.fileobj.readline()
                worker.heard = max(worker.heard, time.monotonic())
                if line and "begin" in (told := json.loads(line)):
                    worker.current = told["begin"]
                elif line:
                    worker.left.remove(told["index"])
                    worker.current = None
                    yield told
                else:
                    worker.heard = 0  # it has ended
            for worker in list(running):
                if time.monotonic() - worker.heard < STUCK_S:
                    continue
                selector.unregister(worker.process.stdout)
                if worker.left:
                    yield worker.kill()
                if worker.left:
                    worker.start()
                    selector.register(worker.process.stdout, selectors.EVENT_READ, worker)
                else:
                    running.remove(worker)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="fuzz", description=__doc__.partition("\n")[0])
    parser.add_argument("--inputs", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--only", type=int, help="repeat one input")
    parser.add_argument("--indices", help=argparse.SUPPRESS)  # of a worker
    options = parser.parse_args()
    if options.indices is not None:
        work(map(int, options.indices.split(",")), options.seed)
        return
    if options.only is not None:
        outcome = attempt(options.only, options.seed)
        print(f"{outcome['target']}: {outcome['result']} in {outcome['s']:.2f} s")
        print(outcome["error"])
        return
    started = time.monotonic()
    counts: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    slowest = 0.0
    for outcome in run(range(options.inputs), options.seed, options.workers):
        counts[outcome["target"]][outcome["result"]] += 1
        slowest = max(slowest, outcome["s"])
        if outcome["result"] == "failed":
            again = f"python -m fuzz --seed {options.seed} --only {outcome['index']}"
            print(f"\n{outcome['target']} ({again}):\n{outcome['error']}", flush=True)
    print(f"{'input':24} accepted  refused  failed")
    for name, found in counts.items():
        row = "".join(f"{found[kind]:9d}" for kind in ("accepted", "refused", "failed"))
        print(f"{name:23}{row}")
    total = sum(counts.values(), collections.Counter())
    print(
        f"{total.total()} inputs, {total['failed']} failures, slowest {slowest:.1f} s, "
        f"{time.monotonic() - started:.0f} s in all"
    )
    sys.exit(bool(total["failed"]))


if __name__ == "__main__":
    main()
