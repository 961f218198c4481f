"""Slots: images that share the sampling loop while each stands at a noise level of its own.

An image that is done leaves its slot, and another one enters there between two runs of the loop.
"""

import collections
import dataclasses
from collections.abc import Hashable, Iterator, Sequence
from typing import Any, NamedTuple, cast

import jax
import numpy as np

from jaxdiff.core.timing import StageTimer
from jaxdiff.core.types import Array, Bool, Float, NDArray, PyTree
from jaxdiff.diffusion.denoising import select
from jaxdiff.guidance.base import Guidance
from jaxdiff.pipeline.batches import (
    STAGES,
    BatchInputs,
    BatchPrompts,
    ImageGenerator,
    Run,
    by_batch_key,
    guidance_rule,
    guidance_scales,
    handover_scale,
    streams_of,
    tile_size,
)
from jaxdiff.pipeline.compiled_model import CompiledModel, LoopInputs, SamplingLoop
from jaxdiff.pipeline.conditioning import Conditioning, EncodedPrompts, texts_by_encoder
from jaxdiff.pipeline.output import Settings
from jaxdiff.pipeline.request import Request, Requests
from jaxdiff.samplers.base import Sampler, SamplingState

CACHED_TEXTS = 2**28  # bytes of encoded texts that are kept on the host


class PreparedImage(NamedTuple):
    """An image before its first step: what the sampling loop reads, one row on the host."""

    request: Request
    inputs: LoopInputs  # with keys as numbers, and noise only if it is not that of the seed
    rule: Guidance
    sampler: Sampler
    latent_shape: tuple[int, ...]

    @property
    def key(self) -> Hashable:
        """What images that share slots have in common."""
        leaves, structure = jax.tree.flatten(self.inputs)
        shapes = tuple((np.shape(leaf), np.asarray(leaf).dtype) for leaf in leaves)
        return self.request.batch_key, self.rule, structure, shapes

    @property
    def first(self) -> int:
        """The step that it begins with."""
        return int(self.inputs.own.grid.first[0])

    @property
    def last(self) -> int:
        """The step before which it is done."""
        return int(self.inputs.own.grid.last[0])


class ImagePreparer(ImageGenerator):
    """Encodes all that requests begin with, one image a device at a time.

    So what an image begins with does not depend on the others, to the last bit. Equal texts are
    encoded once while `CACHED_TEXTS` hold them.
    """

    _texts: "collections.OrderedDict[Hashable, tuple[PyTree, int]] | None" = None
    _text_bytes = 0

    def prepare(self, requests: Sequence[Request], settings: Settings) -> list[PreparedImage]:
        """The images of `requests`, in their order; raises InputError."""
        prepared: dict[int, PreparedImage] = {}
        for numbers in by_batch_key(requests):
            by_rule: dict[Any, list[int]] = {}
            for number in numbers:
                rule = guidance_rule(Requests([requests[number]]))
                by_rule.setdefault(rule, []).append(number)
            for rule, alike in by_rule.items():
                prepared |= self._prepare_alike(rule, {i: requests[i] for i in alike}, settings)
        return [prepared[i] for i in range(len(requests))]

    def decode_alike(
        self, images: Sequence[tuple[PreparedImage, NDArray]], settings: Settings
    ) -> list[tuple[NDArray, bool]]:
        """What latents of one shape decode to, and which of it is finite, an image a device."""
        running: list[Any] = []  # decoded on the devices, without waiting for one after the other
        shards = self._stages.num_shards
        for start in range(0, len(images), shards):
            own = images[start : start + shards]
            latents = np.stack([own[row][1] for row in self.padding(len(own), shards)])
            request = own[0][0].request
            if settings.output == "latent":
                grid = jax.tree.map(_concatenated, *(image.inputs.own.grid for image, _ in own))
                requests = Requests(image.request for image, _ in own)
                scale = handover_scale(grid, np.asarray(grid.last), requests)
                decoded = latents[: len(own)] / scale.reshape(-1, *(1,) * (latents.ndim - 1))
                finite = np.all(np.isfinite(decoded).reshape(len(decoded), -1), axis=1)
            else:
                tile = tile_size(
                    settings.vae_tile, (request.height, request.width), self._downscale
                )
                on_devices = self._stages.shard(latents)
                if tile is None:
                    decoded, finite = self._stages.decode(on_devices)
                else:
                    decoded, finite = self.decode(on_devices, tile)
            running.append((len(own), settings.output == "latent" or tile, decoded, finite))
        found: list[tuple[NDArray, bool]] = []
        for count, on_host, *pair in running:
            pixels, is_finite = pair if on_host else map(self._stages.gather, pair)
            found += [(pixels[i], bool(is_finite[i])) for i in range(count)]
        return found

    def _prepare_alike(
        self, rule: Guidance, requests: dict[int, Request], settings: Settings
    ) -> dict[int, PreparedImage]:
        """Those of one batch key that `rule` guides."""
        texts = dict(zip(requests, self._encoded(rule, list(requests.values())), strict=True))
        by_shape: dict[Any, list[int]] = {}
        for number, encoded in texts.items():
            by_shape.setdefault(str(jax.tree.map(np.shape, encoded)), []).append(number)
        found, shards = {}, self._stages.num_shards
        for numbers in by_shape.values():
            for start in range(0, len(numbers), shards):
                own = numbers[start : start + shards]
                rows = self.padding(len(own), shards)
                batch = Requests(requests[own[row]] for row in rows)
                prompts = jax.tree.map(_concatenated, *(texts[own[row]] for row in rows))
                size = batch[0].height, batch[0].width
                tile = tile_size(settings.vae_tile, size, self._downscale)
                run = Run(batch, rule, StageTimer(STAGES, lambda: 0.0), tile, settings)
                inputs = self._inputs(batch, rule, guidance_scales(batch), prompts)
                whole = self._on_host(self._loop_inputs(inputs, run))
                for row, number in enumerate(own):
                    found[number] = PreparedImage(
                        requests[number],
                        jax.tree.map(lambda leaf, row=row: leaf[row : row + 1], whole),
                        rule,
                        self._sampler(batch[0]),
                        self._facts.latent_shape(batch[0]),
                    )
        return found

    def _loop_inputs(self, inputs: BatchInputs, run: Run) -> LoopInputs:
        """What the sampling loop reads, but for the noise of seeds, which slots draw."""
        conditioning, latents, mask = self._conditioning(inputs, run)
        noise = cast(Any, inputs.initial.noise)
        return LoopInputs(inputs.own, noise, conditioning, latents, mask)

    def _on_host(self, inputs: LoopInputs) -> LoopInputs:
        """The same with arrays of the devices on the host, and keys as numbers."""
        gather = self._stages.gather
        on_devices = {
            name: jax.tree.map(gather, getattr(inputs, name))
            for name in ("conditioning", "given", "mask")
        }
        own = inputs.own._replace(keys=cast(Any, jax.random.key_data(inputs.own.keys)))
        return jax.tree.map(np.asarray, inputs._replace(own=own, **on_devices))

    def _encoded(self, rule: Guidance, requests: Sequence[Request]) -> list[BatchPrompts]:
        """The encoded texts of each request, one row each, from the cache as far as it has them."""
        if self._texts is None:
            self._texts = collections.OrderedDict()
        keys = [self._text_key(rule, request) for request in requests]
        missing = {
            key: each for key, each in zip(keys, requests, strict=True) if key not in self._texts
        }
        encoded = self._encode(rule, list(missing.values())) if missing else []
        fresh = dict(zip(missing, encoded, strict=True))
        found = [fresh.get(key) or self._texts[key][0] for key in keys]
        for key, prompts in fresh.items():
            size = sum(leaf.nbytes for leaf in jax.tree.leaves(prompts))
            self._texts[key] = prompts, size
            self._text_bytes += size
        for key in keys:
            if key in self._texts:
                self._texts.move_to_end(key)
        while self._text_bytes > CACHED_TEXTS:
            _, (_, size) = self._texts.popitem(last=False)
            self._text_bytes -= size
        return found

    def _text_key(self, rule: Guidance, request: Request) -> Hashable:
        """What the encoded texts of a request depend on."""
        texts = [
            tuple(tuple(column) for column in texts_by_encoder(request, streams_of(rule, network)))
            for network in ("main", "guidance_model")
        ]
        own = request.clip_skip, request.prompt_syntax, request.max_sequence_length
        return *texts, *own, id(self._auxiliary.guidance_model), self._stages.weights_version

    def _encode(self, rule: Guidance, requests: Sequence[Request]) -> Iterator[BatchPrompts]:
        """The texts of each request, encoded on one device."""
        group = Requests(requests)
        chunks = [reads.num_chunks(group, own) for reads, own in self._readers(rule)]
        lengths = list(zip(*chunks, strict=True))
        found: dict[int, BatchPrompts] = {}
        shards, weaker = self._stages.num_shards, self._auxiliary.guidance_model
        encoded: list[tuple[list[int], Any, Any]] = []  # images, and their texts on the devices
        with self._stages.text_encoders_on_devices():
            for length in sorted(set(lengths)):
                alike = [i for i, own in enumerate(lengths) if own == length]
                for start in range(0, len(alike), shards):
                    own = alike[start : start + shards]
                    rows = self.padding(len(own), shards)
                    tokens = self._prompts(Requests(requests[own[row]] for row in rows), rule)
                    skip = requests[own[0]].clip_skip
                    main, guide = self._stages.encode_text(cast(Any, tokens.main), skip=skip), None
                    if weaker is not None and tokens.guidance_model is not None:
                        own_tokens = cast(Any, tokens.guidance_model)
                        guide = weaker.stages.encode_text(own_tokens, skip=skip)
                    encoded.append((own, main, guide))
        # Only now, so that none of them waits for a chunk of steps of its own.
        for own, main, guide in encoded:
            pair = BatchPrompts(_on_host(self._stages, main), None)
            if guide is not None and weaker is not None:
                pair = pair._replace(guidance_model=_on_host(weaker.stages, guide))
            for row, number in enumerate(own):
                found[number] = jax.tree.map(lambda leaf, row=row: leaf[row : row + 1], pair)
        for number in range(len(requests)):
            yield found[number]


def _on_host(stages: CompiledModel, conditioning: Conditioning) -> EncodedPrompts:
    return EncodedPrompts(jax.tree.map(stages.gather, conditioning))


def _concatenated(*rows: NDArray) -> NDArray:
    return np.concatenate(rows)


@dataclasses.dataclass
class _Seat:
    """An image in its slot, and the step that comes next."""

    ticket: Any
    image: PreparedImage
    position: int


class Slots:
    """`size` slots for images of one key; what is in them advances together.

    A slot that is empty rests: it costs its share of a step, and nothing of it is read. On a
    CPU each image gets to the same bits whoever is in the others.
    """

    def __init__(self, model: CompiledModel, size: int) -> None:
        shards = model.num_shards
        self.size = -(-size // shards) * shards  # a multiple of which the devices share
        self._model = model
        # elsewhere bits may differ, and what no image needs is not computed
        self._uniform = model.layout.devices[0].platform == "cpu"
        self._seats: list[_Seat | None] = [None] * self.size
        self._loop: SamplingLoop | None = None
        self._version = -1  # of the weights that it reads
        self._merge = model.program(merged, "bbb")
        self._state: SamplingState | None = None

    @property
    def free(self) -> int:
        """How many slots are empty."""
        return sum(seat is None for seat in self._seats)

    @property
    def tickets(self) -> list[Any]:
        """Those of the images in the slots."""
        return [seat.ticket for seat in self._seats if seat is not None]

    @property
    def seated(self) -> list[tuple[Any, PreparedImage]]:
        """Ticket and image in each slot that is not empty."""
        return [(seat.ticket, seat.image) for seat in self._seats if seat is not None]

    @property
    def steps_left(self) -> list[int]:
        """Of each image in a slot."""
        return [seat.image.last - seat.position for seat in self._seats if seat is not None]

    def position(self, ticket: Any) -> tuple[int, int]:
        """How many steps an image has made, and of how many."""
        seat = next(seat for seat in self._seats if seat is not None and seat.ticket is ticket)
        first = seat.image.first
        return seat.position - first, seat.image.last - first

    def admit(self, images: Sequence[tuple[Any, PreparedImage]]) -> None:
        """Give each of the images, with its ticket, an empty slot of its own."""
        entering = np.zeros(self.size, bool)
        empty = [i for i, seat in enumerate(self._seats) if seat is None]
        for slot, (ticket, image) in zip(empty, images, strict=False):
            self._seats[slot], entering[slot] = _Seat(ticket, image, image.first), True
        some = next(seat.image for seat in self._seats if seat is not None)
        rows = [some if seat is None else seat.image for seat in self._seats]
        inputs = jax.tree.map(_concatenated, *(row.inputs for row in rows))
        keys = jax.random.wrap_key_data(cast(Any, inputs.own.keys))
        noise, put = inputs.noise, self._model.shard
        if noise is None:
            noise = self._model.noise(keys, some.latent_shape)
        on_devices = inputs._replace(
            own=inputs.own._replace(keys=keys),
            noise=put(noise) if inputs.noise is not None else noise,
            conditioning=put(inputs.conditioning),
            given=put(inputs.given),
            mask=put(inputs.mask),
        )
        if self._loop is None or self._version != self._model.weights_version:
            self._loop = SamplingLoop(
                self._model,
                on_devices,
                sampler=some.sampler,
                rule=some.rule,
                uniform=self._uniform,
            )
            self._version = self._model.weights_version
        else:
            self._loop.place(on_devices)
        state = self._loop.begin()
        if self._state is not None:
            state = self._merge(put(entering), state, self._state)
        self._state = state

    def run(self, steps: int) -> float:
        """Advance each image by so many steps, or as many as it has left; returns seconds."""
        if self._loop is None or self._state is None:
            return 0.0
        # an empty slot stands at a last step, as one that is done does
        self._loop.go_to(
            np.array([2**30 if seat is None else seat.position for seat in self._seats], np.int32)
        )
        self._state, seconds = self._loop.run(self._state, 0, steps)
        for seat in self._seats:
            if seat is not None:
                seat.position = min(seat.position + steps, seat.image.last)
        return seconds

    def take_finished(self) -> list[tuple[Any, PreparedImage, Float[NDArray, "*d"]]]:
        """Ticket, image and latents of what is done, whose slots are empty then."""
        done = [
            i
            for i, seat in enumerate(self._seats)
            if seat is not None and seat.position >= seat.image.last
        ]
        if not done or self._state is None:
            return []
        latents, found = self._model.gather(self._state.x), []
        for slot in done:
            seat = cast(_Seat, self._seats[slot])
            found.append((seat.ticket, seat.image, np.array(latents[slot])))
            self._seats[slot] = None
        return found

    def remove(self, ticket: Any) -> None:
        """Empty the slot of an image that is not wanted any more."""
        self._seats = [
            None if seat is not None and seat.ticket is ticket else seat for seat in self._seats
        ]

    def denoised(self, ticket: Any) -> Float[NDArray, "*d"]:
        """The denoised latents of an image at its last step: a preview."""
        slot = next(
            i for i, seat in enumerate(self._seats) if seat is not None and seat.ticket is ticket
        )
        return np.array(self._model.gather(cast(SamplingState, self._state).x0)[slot])


def merged(entering: Bool[Array, "b"], new: SamplingState, old: SamplingState) -> SamplingState:
    """The state with that of images which enter in place of the old one."""
    return select(entering, new, old)
