"""`train.py CONFIG --workdir FOLDER [--any.field value]`: start or resume a training.

With `--plan TOPOLOGY` the training step is compiled for absent devices: see `planning`.
"""

import dataclasses
import functools
import importlib
import importlib.util
import pathlib
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Annotated, TypeVar

import tyro

from jaxdiff.checkpoints.training_state import latest_step
from jaxdiff.cli.arguments import check_unknown, errors_as_sentences, has_option
from jaxdiff.cli.main import report
from jaxdiff.core.aliases import MODULES, rename_options
from jaxdiff.core.errors import InputError
from jaxdiff.experiments.experiment import CHECKPOINTS
from jaxdiff.experiments.train import SaveError, train
from jaxdiff.parallel.distributed import (
    DistributedConfig,
    abort_peers_on_error,
    all_agree,
    initialize,
    is_first,
)
from jaxdiff.training.config import TrainConfig
from jaxdiff.training.config.aliases import new_option
from jaxdiff.training.loop import NonFiniteError, StoppedError

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """The options of the command line."""

    config: TrainConfig
    workdir: pathlib.Path
    export_only: bool
    ema_std: float | None
    job: DistributedConfig


Workdir = Annotated[
    pathlib.Path,
    tyro.conf.arg(help="folder for checkpoints, log, samples and export; the same command resumes"),
]
ExportOnly = Annotated[bool, tyro.conf.arg(help="only export the newest checkpoint")]
EMAStd = Annotated[
    float | None,
    tyro.conf.arg(help="export the power-function EMA of this relative std (ema.power_stds)"),
]
# The fields of the config get no prefix of their own: --steps, --optimiser.learning-rate.
Fields = Annotated[TrainConfig, tyro.conf.arg(name="")]


def load_config(path: pathlib.Path) -> TrainConfig:
    """The `config` that the Python file at `path` defines."""
    if not path.is_file():
        raise InputError(
            f"config: got {path}, expected an existing Python file such as configs/scenes_vae.py"
        )
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise InputError(f"config: got {path}, expected a file name that ends in .py")
    for former, present in MODULES.items():
        sys.modules.setdefault(former, importlib.import_module(present))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = getattr(module, "config", None)
    if not isinstance(config, TrainConfig):
        raise InputError(f"{path}: got {type(config).__name__}, expected config = TrainConfig(...)")
    return config


def parse(arguments: Sequence[str]) -> Options:
    """The options of a command line; prints help or usage errors and exits (2) like argparse."""
    if not arguments or arguments[0].startswith("-"):
        print("usage: train.py CONFIG --workdir FOLDER [--any.field value ...]", file=sys.stderr)
        print("       train.py CONFIG --plan TOPOLOGY ... [--any.field value]", file=sys.stderr)
        print("       train.py CONFIG --help lists every field", file=sys.stderr)
        raise SystemExit(0 if arguments and arguments[0] in ("-h", "--help") else 2)
    given = load_config(pathlib.Path(arguments[0]))

    def options(
        *,
        workdir: Workdir,
        export_only: ExportOnly = False,
        ema_std: EMAStd = None,
        job: Annotated[DistributedConfig, tyro.conf.arg(name="")] = DistributedConfig(),  # noqa: B008 - it is frozen
        config: Fields = given,
    ) -> Options:
        return Options(
            config=config, workdir=workdir, export_only=export_only, ema_std=ema_std, job=job
        )

    return _parsed(options, arguments, "Start or resume a training.")


def _parsed(options: Callable[..., T], arguments: Sequence[str], description: str) -> T:
    """What the function `options` makes of the arguments after the config's name."""
    prog = f"train.py {arguments[0]}"
    with errors_as_sentences(arguments):
        made, unknown = tyro.cli(
            options,
            prog=prog,
            description=description,
            args=rename_options(arguments[1:], new_option),
            config=(tyro.conf.AvoidSubcommands,),
            return_unknown_args=True,
        )
    check_unknown(unknown, options, prog)
    return made


def plan(arguments: Sequence[str]) -> None:
    """Print the plans of `CONFIG --plan TOPOLOGY ...`."""
    given = load_config(pathlib.Path(arguments[0]))

    def options(
        *,
        plan: Annotated[
            tuple[str, ...], tyro.conf.arg(help="topologies such as v5p:4x4x4 or h200:8")
        ],
        find_max_batch: Annotated[
            bool, tyro.conf.arg(help="also find the largest batch that fits")
        ] = True,
        json: Annotated[bool, tyro.conf.arg(help="print one JSON object")] = False,
        config: Fields = given,
    ) -> Callable[[], None]:
        from jaxdiff.cli.plan import plan_training

        return functools.partial(plan_training, config, plan, largest=find_max_batch, as_json=json)

    described = "Compile the training step for absent TPUs or GPUs; report memory and time."
    _parsed(options, arguments, described)()


def run(arguments: Sequence[str]) -> None:
    """The command. After SIGINT or SIGTERM SystemExit with 130 or 0, once the state is saved."""
    if has_option(arguments[1:], "--plan"):
        plan(arguments)
        return
    options = parse(arguments)
    initialize(options.job)
    with abort_peers_on_error(functools.partial(report, "train")):
        _train(options)


def _train(options: Options) -> None:
    try:
        result = train(
            options.config,
            options.workdir,
            export_only=options.export_only,
            ema_std=options.ema_std,
        )
    except StoppedError as stopped:
        _print(f"{stopped}; the same command resumes from there")
        raise SystemExit(130 if stopped.signal == signal.SIGINT else 0) from None
    except NonFiniteError as error:
        command = "a start with a lower --optimiser.learning-rate"
        _print(f"{error}; training stopped. {_resume_hint(options.workdir, command)}")
        raise SystemExit(1) from None
    except SaveError as error:
        _print(f"{error}; training stopped. {_resume_hint(options.workdir, 'the same command')}")
        raise SystemExit(1) from None
    _print(f"exported to {result.export}")
    all_agree(True)  # the others wait here, as long as it takes to write


def _print(message: str) -> None:
    if is_first():
        print(f"train: {message}", file=sys.stderr)


def _resume_hint(workdir: pathlib.Path, command: str) -> str:
    """From where training resumes."""
    step = latest_step(workdir / CHECKPOINTS)
    if step is None:
        return f"There is no checkpoint yet: {command} starts over"
    return f"The last good checkpoint is of step {step}: {command} resumes from there"
