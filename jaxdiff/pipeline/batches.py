"""Requests in batches, and a batch through all stages: from prompts and noise to images."""

import dataclasses
import math
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, cast

import jax
import numpy as np

from jaxdiff.checkpoints.schedulers import SchedulerOptions
from jaxdiff.checkpoints.timestep_grids import convention_of, make_grid
from jaxdiff.core.errors import InputError
from jaxdiff.core.timing import StageTimer
from jaxdiff.core.types import Bool, Float, Int, NDArray, UInt8
from jaxdiff.core.validate import in_range
from jaxdiff.diffusion.grids import TimestepGrid
from jaxdiff.diffusion.schedules import FlowSchedule, Schedule
from jaxdiff.families.base import Family
from jaxdiff.families.extras import ExtraInputs
from jaxdiff.guidance.base import Guidance, GuidanceScales, Stream, parse
from jaxdiff.models.latent_codec import LatentCodec
from jaxdiff.pipeline.auxiliary_models import AuxiliaryModels
from jaxdiff.pipeline.compiled_model import (
    NO_TARGETS,
    CompiledModel,
    ConditioningPair,
    LoopInputs,
    PerImage,
    StartLevel,
)
from jaxdiff.pipeline.conditioning import (
    EncodedPrompts,
    PromptTokenizers,
    TokenizedPrompts,
    sub_prompts,
    texts_by_encoder,
)
from jaxdiff.pipeline.image_inputs import InitialImages, downsample_mask, initial_images
from jaxdiff.pipeline.nonfinite import since_when
from jaxdiff.pipeline.offload import encode_ahead
from jaxdiff.pipeline.output import BatchResult, Settings
from jaxdiff.pipeline.programs import BatchArray
from jaxdiff.pipeline.request import Request, Requests
from jaxdiff.pipeline.tiling import MAX_UNTILED, TILE, decode_tiles, encode_tiles
from jaxdiff.samplers.base import EXTRA_NOISE_STEP, Sampler, get_sampler, per_sample_keys

STAGES = ("encode_s", "sample_s", "decode_s")


class ModelFacts(NamedTuple):
    """What batches depend on beside the compiled networks."""

    family: Family
    schedule: Schedule
    scheduler_options: SchedulerOptions
    network: Any  # the adapter of the denoiser
    codec: LatentCodec  # of which only the config counts
    image_prompts: Any  # requests -> CLIP's embeddings (b, d) of their images

    def latent_shape(self, request: Request) -> tuple[int, ...]:
        """The shape of the latents of an image: height, width and channels."""
        return self.codec.latent_shape(request.height, request.width)

    def grid(self, requests: Sequence[Request]) -> TimestepGrid:
        """The timestep grid of each image, with the steps to run, on the host."""
        grids: dict[tuple[Any, ...], TimestepGrid] = {}
        rows = []
        for request in requests:
            sampler, steps, spacing = request.sampler, request.steps, request.timestep_spacing
            num_tokens = request.height * request.width // (2 * self.codec.config.downscale) ** 2
            key = sampler, steps, spacing, num_tokens
            if key not in grids:
                grid = make_grid(
                    self.schedule,
                    sampler,
                    steps,
                    prediction_type=self.network.prediction_type,
                    spacing=spacing,
                    options=self.scheduler_options,
                    num_tokens=num_tokens,
                )
                grids[key] = jax.tree.map(np.asarray, grid)
            grid = grids[key]
            ends = request.step_range(
                np.asarray(grid.t[0, :steps]),
                grid.t.shape[1] - 1,
                round_up=isinstance(self.schedule, FlowSchedule),  # as diffusers' pipelines do
            )
            first, last = (np.array([end], np.int32) for end in ends)
            rows.append(grid._replace(first=first, last=last))
        return jax.tree.map(lambda *leaves: np.concatenate(leaves), *rows)


class BatchPrompts(NamedTuple):
    """The prompts of a batch, as tokens or encoded."""

    main: TokenizedPrompts | EncodedPrompts
    guidance_model: TokenizedPrompts | EncodedPrompts | None = None  # for a weaker network


class BatchInputs(NamedTuple):
    """Everything that differs between the images of a batch, one row for each."""

    prompts: BatchPrompts
    own: PerImage
    initial: InitialImages


class PlannedBatch(NamedTuple):
    """Requests that are generated together, before anything of them is computed."""

    numbers: list[int]  # of the images
    requests: Requests
    rule: Guidance
    scales: GuidanceScales
    tile: int | None  # of the VAE, in pixels


def by_batch_key(requests: Sequence[Request]) -> list[list[int]]:
    """The numbers of the requests that share each batch key."""
    groups: dict[Any, list[int]] = {}
    for i, request in enumerate(requests):
        groups.setdefault(request.batch_key, []).append(i)
    return list(groups.values())


def make_batches(
    lengths: Sequence[tuple[int, ...]], requests: Sequence[Request], size: int
) -> Iterator[list[int]]:
    """The numbers of the images of each batch, for `requests` with one batch key.

    The prompts of a batch have one length, so that an image does not depend on its batch. Images
    with similar numbers of steps are together: a batch runs as long as its longest.
    """
    for length in sorted(set(lengths)):
        alike = [i for i, own in enumerate(lengths) if own == length]
        ordered = sorted(alike, key=lambda i: requests[i].steps)
        for first in range(0, len(ordered), size):
            yield ordered[first : first + size]


class Run(NamedTuple):
    """What the images of one batch share."""

    requests: Requests  # one for each row of the padded batch
    rule: Guidance
    timer: StageTimer
    tile: int | None  # of the VAE, in pixels
    settings: Settings


def guidance_rule(requests: Requests) -> Guidance:
    """The cheapest rule that guides all of the images; InputError if there is none."""
    rule = parse(requests[0].guidance).for_prompts(max(map(len, map(sub_prompts, requests))))
    return rule.simplify(requests.guidance_scales)


def streams_of(rule: Guidance, network: str) -> list[Stream]:
    """The streams that a network computes: "main" or "guidance_model"."""
    return [stream for stream in rule.streams if stream.network == network]


def guidance_scales(requests: Requests) -> GuidanceScales:
    """The guidance scales of each image, on the host."""
    scales = np.asarray(requests.guidance_scales, np.float32)
    negative = weights = None
    if any(scale is not None for scale in requests.negative_scales):
        pairs = zip(requests.negative_scales, requests.guidance_scales, strict=True)
        negative = np.asarray([w if wn is None else wn for wn, w in pairs], np.float32)
    composed = [sub_prompts(request) for request in requests]
    longest = max(map(len, composed))
    if longest > 1:
        weights = np.zeros((len(composed), longest), np.float32)
        for row, parts in zip(weights, composed, strict=True):
            row[: len(parts)] = [part.weight for part in parts]
    return GuidanceScales(*cast(Any, (scales, negative, weights)))


def start_level(grid: TimestepGrid, requests: Requests, family: Family) -> StartLevel:
    """From noise, from initial images with noise, or from latents as noisy as they are."""
    noise, count = np.asarray(grid.init_noise_sigma), len(requests)
    sigma, alpha = noise, None
    if requests[0].denoising_start is not None:
        sigma = np.zeros(count, np.float32)
        alpha = handover_scale(grid, np.asarray(grid.first), requests)
    elif requests[0].image is not None:
        # a mask at full strength leaves nothing of what it covers
        full = np.array([each.strength == 1 and each.mask is not None for each in requests])
        starts = np.arange(count), np.asarray(grid.first)
        levels = np.asarray(grid.alpha)[starts], np.asarray(grid.sigma)[starts]
        if family.image_level is not None:
            levels = family.image_level(np.array([each.strength or 1.0 for each in requests]))
        sigma = np.where(full, noise, levels[1])
        alpha = np.where(full, np.float32(0), levels[0])
    return StartLevel(*cast(Any, (sigma, alpha)))


def handover_scale(
    grid: TimestepGrid, step: Int[NDArray, "b"], requests: Requests
) -> Float[NDArray, "b"]:
    """x in units of the latents that a call gives or takes in the middle of the way.

    These are what diffusers' scheduler of the sampler carries, x or x / alpha, at level `step`.
    """
    alpha = np.asarray(grid.alpha)
    if not convention_of(requests[0].sampler).carries_x_over_alpha:
        return np.ones(len(alpha), np.float32)
    return alpha[np.arange(len(alpha)), step]


def tile_size(tile: int | None, size: tuple[int, int], downscale: int) -> int | None:
    """The side of the tiles in pixels for images of `size`; None for no tiles.

    `tile` is the wanted one: InputError unless it is a multiple of `downscale`.
    """
    if tile is None:
        return TILE // downscale * downscale if math.prod(size) > MAX_UNTILED else None
    if tile < 2 * downscale or tile % downscale:
        raise InputError(
            f"vae_tile: got {tile}, expected a multiple of {downscale} that is at least "
            f"{2 * downscale}"
        )
    return tile


class ImageGenerator:
    """Generates the images of requests with the compiled stages of a model."""

    def __init__(
        self,
        facts: ModelFacts,
        stages: CompiledModel,
        tokenizers: PromptTokenizers,
        auxiliary: AuxiliaryModels,
    ) -> None:
        self._facts = facts
        self._stages = stages
        self._tokenizers = tokenizers
        self._auxiliary = auxiliary
        self._downscale = facts.codec.config.downscale

    def generate(self, requests: Sequence[Request], settings: Settings) -> Iterator[BatchResult]:
        """The images, batch by batch; smaller batches are padded to the batch size."""
        batch_size = settings.batch_size or len(requests)
        if settings.intermediate_steps:
            grid = self._facts.grid(requests)
            for step in settings.intermediate_steps:
                in_range("intermediate_steps", step, int(max(grid.first)), int(min(grid.last)) - 1)
        batches = self._batches(requests, settings, batch_size)
        encoded: deque[BatchPrompts] = deque()
        for i, (numbers, batch, rule, scales, tile) in enumerate(batches):
            timer = StageTimer(STAGES, lambda: self._stages.compile_s)
            inputs = self._inputs(batch, rule, scales)
            padding = self.padding(len(batch), batch_size)
            padded = jax.tree.map(lambda rows, p=padding: rows[p], inputs)
            if self._stages.offloads_text:
                if not encoded:
                    ahead = (self._padded_prompts(each, batch_size) for each in batches[i:])
                    with timer("encode_s"):
                        encoded.extend(encode_ahead(self._stages, self._auxiliary, ahead))
                padded = padded._replace(prompts=encoded.popleft())
            run = Run(Requests(batch[i] for i in padding), rule, timer, tile, settings)
            latents, intermediates = self._denoise(padded, run)
            latents = self._handover(latents, padded, batch)
            if settings.output != "latent":
                with timer("decode_s"):
                    images, finite = self.decode(latents, tile)
            else:
                images = self._stages.gather(latents)
                finite = np.isfinite(images).reshape(len(images), -1).all(axis=1)
            yield BatchResult(
                numbers=numbers,
                images=images[: len(batch)],
                grid=inputs.own.grid,
                intermediates=intermediates[: len(batch)],
                failures={
                    numbers[i]: self._failure(padded, run, i)
                    for i in np.flatnonzero(~np.asarray(finite)[: len(batch)]).tolist()
                },
                timings=timer.timings(),
            )

    def _batches(
        self, requests: Sequence[Request], settings: Settings, size: int
    ) -> list[PlannedBatch]:
        """The batches of at most `size` requests, in the order in which they are generated."""
        batches = []
        for numbers in by_batch_key(requests):
            group = Requests(requests[i] for i in numbers)
            tile = tile_size(settings.vae_tile, (group[0].height, group[0].width), self._downscale)
            rule, scales = guidance_rule(group), guidance_scales(group)
            # how many chunks the prompts of each image have, for each network
            chunks = [reads.num_chunks(group, own) for reads, own in self._readers(rule)]
            for rows in make_batches(list(zip(*chunks, strict=True)), group, size):
                batch = Requests(group[row] for row in rows)
                own = jax.tree.map(lambda values, r=rows: values[r], scales)
                batches.append(PlannedBatch([numbers[i] for i in rows], batch, rule, own, tile))
        return batches

    def padding(self, count: int, size: int) -> Int[NDArray, "b"]:
        """The images that fill a batch of `size`: all of them, and the last one again."""
        shards = self._stages.num_shards  # a multiple of which the devices share
        return np.minimum(np.arange(-(-size // shards) * shards), count - 1)

    def _handover(self, latents: BatchArray, inputs: BatchInputs, batch: Requests) -> BatchArray:
        """Latents as a call gives them."""
        scale = handover_scale(inputs.own.grid, np.asarray(inputs.own.grid.last), batch)
        if np.all(scale == 1):
            return latents
        whole = self._stages.gather(latents)
        return self._stages.shard(whole / scale.reshape(-1, *(1,) * (whole.ndim - 1)))

    def _readers(self, rule: Guidance) -> list[tuple[PromptTokenizers, list[Stream]]]:
        """The tokenizers of each network of a rule, and the streams that it computes."""
        weaker, own = self._auxiliary.guidance_model, streams_of(rule, "guidance_model")
        readers = [(self._tokenizers, streams_of(rule, "main"))]
        return readers if weaker is None or not own else [*readers, (weaker.tokenizers, own)]

    def _inputs(
        self,
        requests: Requests,
        rule: Guidance,
        scales: GuidanceScales,
        prompts: BatchPrompts | None = None,
    ) -> BatchInputs:
        """The inputs of one batch, whose `prompts` may be encoded already."""
        grid = self._facts.grid(requests)
        initial = InitialImages()
        if any(requests[0].given_arrays):
            initial = initial_images(requests, self._facts.latent_shape(requests[0]))
        targets = NO_TARGETS
        if any(requests.classifier_scales) or any(requests.clip_scales):
            targets = self._auxiliary.guidance_targets(requests)
        start = start_level(grid, requests, self._facts.family)
        own = PerImage(grid, start, scales, per_sample_keys(requests.seeds), targets)
        return BatchInputs(prompts or self._prompts(requests, rule), own, initial)

    def _prompts(self, requests: Requests, rule: Guidance) -> BatchPrompts:
        """The tokens of the prompts of one batch."""
        return BatchPrompts(*(reads.tokenize(requests, own) for reads, own in self._readers(rule)))

    def _padded_prompts(self, batch: PlannedBatch, size: int) -> tuple[BatchPrompts, int]:
        """The prompts of a batch, and how many layers of the text encoders to skip."""
        rows, prompts = self.padding(len(batch.requests), size), self._prompts(*batch[1:3])
        return jax.tree.map(lambda leaf: leaf[rows], prompts), batch.requests[0].clip_skip

    def _failure(self, inputs: BatchInputs, run: Run, row: int) -> str:
        """Since which step image `row` is not finite; the loop runs once more to find out."""
        steps = tuple(range(int(np.max(inputs.own.grid.first)), int(np.min(inputs.own.grid.last))))
        watched = run._replace(
            settings=dataclasses.replace(run.settings, callback=None, intermediate_steps=steps)
        )
        _, pairs = self._denoise(inputs, watched)
        return since_when(steps, pairs[row], run.requests[row].steps)

    def _denoise(
        self, inputs: BatchInputs, run: Run
    ) -> tuple[BatchArray, Float[NDArray, "b n 2 *d"]]:
        """The final latents, still on the devices, and x and D of the intermediate steps."""
        with run.timer("encode_s"):
            loop_inputs = self._loop_inputs(inputs, run)
        with run.timer("sample_s"):
            latents, pairs = self._stages.denoise(
                loop_inputs,
                sampler=self._sampler(run.requests[0]),
                rule=run.rule,
                callback=run.settings.callback,
                intermediate_steps=run.settings.intermediate_steps,
            )
        count, shape = len(run.requests), self._facts.latent_shape(run.requests[0])
        stacked = np.asarray(pairs, np.float32).reshape(len(pairs), 2, count, *shape)
        return latents, np.moveaxis(stacked, 2, 0)

    def _sampler(self, request: Request) -> Sampler:
        """The sampler of a request, for the schedule of the model."""
        return get_sampler(request.sampler, request.eta).for_schedule(self._facts.schedule)

    def _loop_inputs(self, inputs: BatchInputs, run: Run) -> LoopInputs:
        """What the sampling loop of a batch reads, with all that has to be encoded for it."""
        conditioning, latents, mask = self._conditioning(inputs, run)
        if inputs.initial.noise is None:
            shape = self._facts.latent_shape(run.requests[0])
            noise = self._stages.noise(inputs.own.keys, shape)
        else:
            noise = self._stages.shard(inputs.initial.noise)
        return LoopInputs(inputs.own, noise, conditioning, latents, mask)

    def _conditioning(
        self, inputs: BatchInputs, run: Run
    ) -> tuple[ConditioningPair, BatchArray | None, BatchArray | None]:
        """The conditioning of the networks, the initial latents, and the mask of what changes.

        There is no such mask for a network that sees it itself.
        """
        initial = inputs.initial
        latents, mask = self._stages.shard(initial.latents), None
        if initial.images is not None:
            latents = self._latents(initial.images, run.tile)
        if initial.masks is not None and not self._facts.family.uses_mask:
            mask = self._stages.shard(self._downsample(initial.masks))

        skip, weaker, guide = run.requests[0].clip_skip, self._auxiliary.guidance_model, None
        prompts, extras = inputs.prompts, self._extra_inputs(inputs, run, "main")
        conditioning = self._stages.encode(prompts.main, extras, skip=skip)
        if weaker is not None and prompts.guidance_model is not None:
            extras = self._extra_inputs(inputs, run, "guidance_model")
            guide = weaker.stages.encode(prompts.guidance_model, extras, skip=skip)
        return jax.block_until_ready(ConditioningPair(conditioning, guide)), latents, mask

    def _extra_inputs(self, inputs: BatchInputs, run: Run, network: str) -> ExtraInputs:
        """What the extras of a family read for a network: "main" or "guidance_model"."""
        initial, request = inputs.initial, run.requests[0]
        streams = streams_of(run.rule, network)
        return ExtraInputs(
            size=(request.height, request.width),
            options=tuple(each.extras for each in run.requests),
            prompted=tuple(stream.prompt_source == "prompt" for stream in streams),
            texts=tuple(texts_by_encoder(each, streams)[0] for each in run.requests),
            guidance_scales=np.asarray(inputs.own.scales.scale),
            guidance=request.guidance,
            image=initial.images,
            latents=initial.latents,
            mask=initial.masks,
            low_resolution=initial.low_resolution,
            image_prompts=lambda: self._facts.image_prompts(run.requests),
            latent_size=self._facts.latent_shape(request)[:-1],
            noise=lambda shape: self._stages.gather(
                self._stages.noise(inputs.own.keys, shape, step=EXTRA_NOISE_STEP)
            ),
            encode=lambda images: self._stages.gather(self._latents(images, run.tile)),
            downsample=self._downsample,
        )

    def decode(
        self, latents: BatchArray, tile: int | None
    ) -> tuple[UInt8[NDArray, "b h2 w2 3"] | Float[NDArray, "b d"], Bool[NDArray, "b"]]:
        """What latents decode to, and which of it is finite; tiles are blended on the host."""
        if tile is not None:
            return decode_tiles(self._stages, latents, tile, self._downscale)
        images, finite = self._stages.decode(latents)
        return self._stages.gather(images), self._stages.gather(finite)

    def _latents(self, images: NDArray, tile: int | None) -> BatchArray:
        """Latents on the devices of images, in tiles of `tile` pixels or as a whole."""
        if tile is not None:
            return encode_tiles(self._stages, images, tile, self._downscale)
        return self._stages.latents(self._stages.shard(images))

    def _downsample(self, masks: Float[NDArray, "b h2 w2 1"]) -> Float[NDArray, "b h w 1"]:
        return self._facts.family.latent_mask(downsample_mask(masks, self._downscale))
