"""Prior preservation: half of each batch are class images (DreamBooth, 2208.12242)."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxdiff.core.errors import InputError
from jaxdiff.data.batches import Batch
from jaxdiff.data.texts import CaptionTokenizer
from jaxdiff.experiments.experiment import BatchStream, training_batches
from jaxdiff.training.config import DataConfig, TrainConfig


class PriorPreservationBatches(BatchStream):
    """Batches that alternate between samples of `own` and `prior`, with loss weights.

    The mean of the weighted errors is the mean over own samples plus `weight` times that over prior
    samples.
    """

    def __init__(self, own: BatchStream, prior: BatchStream, weight: float) -> None:
        self._streams, self._weight = {"own": own, "prior": prior}, weight
        fingerprints = {name: each.identity.get("data", "") for name, each in self._streams.items()}
        self.identity = {"data": fingerprints["own"], "prior data": fingerprints["prior"]}

    def __next__(self) -> Batch:
        own, prior = (next(stream) for stream in self._streams.values())
        batch: Batch = {}
        for name in own.keys() | prior.keys():
            pair = [part[name] for part in (own, prior) if name in part]
            if len(pair) == 1 or pair[0].shape != pair[1].shape:
                raise InputError(
                    f"objective.prior_data: got {_shape(prior, name)} for {name}, "
                    f"expected {_shape(own, name)} as data has"
                )
            batch[name] = np.stack(pair, axis=1).reshape(-1, *pair[0].shape[1:])
        count = len(next(iter(own.values())))
        batch["weight"] = np.tile(np.array([2.0, 2.0 * self._weight], np.float32), count)
        return batch

    def get_state(self) -> Any:
        """The states of both streams."""
        return {name: stream.get_state() for name, stream in self._streams.items()}

    def set_state(self, state: Any) -> None:
        """Continue from states that `get_state` returned."""
        for name, stream in self._streams.items():
            stream.set_state(state[name])

    def close(self) -> None:
        """Stop the reading threads."""
        for stream in self._streams.values():
            stream.close()

    def counts(self) -> dict[str, float]:
        """For the log: skipped samples by stream and reason."""
        own, prior = (stream.counts() for stream in self._streams.values())
        return {**own, **{f"prior_{name}": count for name, count in prior.items()}}


def _shape(batch: Mapping[str, np.ndarray], name: str) -> str:
    return str(batch[name].shape) if name in batch else "none"


def prior_preservation_batches(
    config: TrainConfig, prior: DataConfig, weight: float, tokenizer: CaptionTokenizer | None
) -> BatchStream:
    """Training batches half of which are `prior`'s; without `tokenizer` captions are not read."""
    half = config.batch_size // 2
    if config.batch_size % 2:
        raise InputError(
            f"batch_size: got {config.batch_size}, expected an even number: half of it is prior"
        )
    same = ("resolution", "max_aspect_ratio", "bucket_multiple")
    for name in same:
        got, wanted = getattr(prior, name), getattr(config.data, name)
        if got != wanted:
            raise InputError(
                f"objective.prior_data.{name}: got {got}, expected {wanted} as data.{name} is"
            )
    if config.data.max_aspect_ratio != 1:
        raise InputError(
            f"data.max_aspect_ratio: got {config.data.max_aspect_ratio}, expected 1: both halves "
            "of a batch are of one size"
        )
    own_config = dataclasses.replace(config, batch_size=half, gradient_accumulation_steps=1)
    prior_config = dataclasses.replace(own_config, data=prior)
    prior_tokenizer = (
        None if tokenizer is None else dataclasses.replace(tokenizer, caption=prior.caption)
    )
    return PriorPreservationBatches(
        training_batches(own_config, tokenizer),
        training_batches(prior_config, prior_tokenizer),
        weight,
    )
