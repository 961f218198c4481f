"""Write what a workdir or a folder has, for release."""

import dataclasses
import pathlib
import tempfile
from collections.abc import Mapping
from typing import Any

from jaxdiff.checkpoints.adapter_info import AdapterInfo, find_adapter
from jaxdiff.checkpoints.components import read_component, write_component
from jaxdiff.checkpoints.jsonfiles import read_object, write_object
from jaxdiff.checkpoints.lora_writing import write_lora
from jaxdiff.checkpoints.pipelines import (
    AUXILIARY_COMPONENTS,
    INDEX,
    PREPROCESSOR,
    read_pipeline,
    write_pipeline,
)
from jaxdiff.checkpoints.textual_inversion import convert_inversion
from jaxdiff.checkpoints.training_state import TrainingStore, has_checkpoint
from jaxdiff.checkpoints.weights import read_weights
from jaxdiff.core.errors import InputError
from jaxdiff.core.types import Dtype
from jaxdiff.experiments.experiment import CHECKPOINTS
from jaxdiff.experiments.train import experiment
from jaxdiff.experiments.trainer import Trainer
from jaxdiff.experiments.workdir import check_identity, read_config
from jaxdiff.models.prompt_labels import PROMPT_LABELS
from jaxdiff.parallel.distributed import gather_to_host
from jaxdiff.pipeline.defaults import read_defaults, size_of
from jaxdiff.training.config import MeshConfig, resume_identity


def export(
    source: pathlib.Path,
    output: pathlib.Path,
    *,
    defaults: Mapping[str, Any],
    dtype: Dtype,
    ema: bool = True,
) -> None:
    """Write `source`, a diffusers folder or the workdir of a training, in `dtype`.

    `defaults` are options of calls that the written pipeline has by default. Without `ema` the
    weights are the plain ones of the newest checkpoint. Raises InputError.
    """
    with tempfile.TemporaryDirectory() as temporary:
        folder = _folder(source, pathlib.Path(temporary) / "export", ema)
        _export(folder, output, defaults, dtype)


def _folder(source: pathlib.Path, temporary: pathlib.Path, ema: bool) -> pathlib.Path:
    """The folder to export: `source`, the export of a workdir, or one made in `temporary`.

    InputError for plain weights where there is no checkpoint.
    """
    if ema and (source / "export").is_dir():
        return source / "export"
    if has_checkpoint(source / CHECKPOINTS):
        _write_workdir(source, temporary, ema=ema)
        return temporary
    if not ema:
        raise InputError(f"ema: got false for {source}, expected a workdir with checkpoints")
    return source


def _write_workdir(workdir: pathlib.Path, folder: pathlib.Path, *, ema: bool) -> None:
    """Write what a training in `workdir` has learnt so far, averaged or as it is, into `folder`.

    On any number of devices. Raises InputError where something that it was made of has changed.
    """
    config = dataclasses.replace(read_config(workdir), mesh=MeshConfig())
    parts = experiment(config, workdir)
    check_identity(resume_identity(config) | dict(parts.identity), workdir)
    with TrainingStore(workdir / CHECKPOINTS, read_only=True) as store:
        trainer = Trainer(config, workdir, store, parts)
    parts.batches.close()
    parts.export(gather_to_host(trainer.state.ema if ema else trainer.state.params), folder)


def _export(
    source: pathlib.Path, output: pathlib.Path, options: Mapping[str, Any], dtype: Dtype
) -> None:
    """Write the pipeline or the components in `source`."""
    auxiliary = [name for name in AUXILIARY_COMPONENTS if (source / name).is_dir()]
    pipeline = (source / INDEX).exists()
    files = [] if pipeline else sorted(source.glob("*.safetensors"))
    adapters = {file: found.layout for file in files if (found := _find_adapter(file)) is not None}
    if pipeline or not (auxiliary or adapters):
        _export_pipeline(source, output, options, dtype)
    elif options:
        name, value = next(iter(options.items()))
        raise InputError(f"{name}: got {value} for {source}, expected a folder with {INDEX}")
    for file, layout in adapters.items():
        if layout == "LoRA":
            write_lora(output / file.name, file, dtype=dtype)
        else:
            convert_inversion(output / file.name, file, dtype=dtype)
    for name in auxiliary:
        write_component(output / name, read_component(source / name), dtype=dtype)
        for file in (PREPROCESSOR, PROMPT_LABELS):
            if (source / name / file).is_file():
                write_object(output / name / file, read_object(source / name / file))


def _find_adapter(file: pathlib.Path) -> AdapterInfo | None:
    return find_adapter(file, read_weights(file))


def _export_pipeline(
    source: pathlib.Path, output: pathlib.Path, options: Mapping[str, Any], dtype: Dtype
) -> None:
    parts = read_pipeline(source)
    defaults = dict(parts.defaults) | dict(options)
    read_defaults(defaults, parts.scheduler, size_of(None, 1), source="export")
    write_pipeline(output, dataclasses.replace(parts, defaults=defaults), dtype=dtype)
