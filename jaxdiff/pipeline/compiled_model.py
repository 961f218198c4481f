"""A model as compiled functions: encode prompts and images, denoise, decode."""

import contextlib
import functools
import time
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxdiff.core.types import Array, Float, Int, Key, NDArray, PyTree
from jaxdiff.diffusion.denoising import Denoiser, per_image
from jaxdiff.diffusion.grids import TimestepGrid
from jaxdiff.diffusion.losses import add_noise
from jaxdiff.families.base import Family
from jaxdiff.families.extras import ExtraInputs
from jaxdiff.guidance.base import Guidance, GuidanceScales
from jaxdiff.guidance.denoiser import ConditionedNetwork, guided_denoiser
from jaxdiff.models.build import param_dict
from jaxdiff.models.classifier import LatentClassifier
from jaxdiff.models.clip import CLIPModel
from jaxdiff.models.image_processor import CLIPImageProcessor
from jaxdiff.models.latent_codec import LatentCodec, upcast_fp16
from jaxdiff.parallel.chips import compiler_options
from jaxdiff.pipeline.classifier_guidance import (
    GuidanceTargets,
    with_models,
)
from jaxdiff.pipeline.conditioning import (
    Conditioning,
    EncodedPrompts,
    TokenizedPrompts,
    encode_prompts,
)
from jaxdiff.pipeline.intermediates import StepRecorder
from jaxdiff.pipeline.programs import BatchArray, CompiledFunction, Layout
from jaxdiff.samplers.base import (
    INITIAL_NOISE_STEP,
    Sampler,
    SamplingState,
    init_state,
    run_steps,
    step_noise,
)
from jaxdiff.samplers.inpainting import InpaintingMask


class ConditioningPair(NamedTuple):
    """The conditioning of the network and of a guidance model."""

    main: Conditioning
    guidance_model: Conditioning | None = None  # of a weaker network


class Networks(NamedTuple):
    """What the loop runs, or its weights: denoisers, and other modules without their weights."""

    denoiser: Any
    guidance_model: Any = None  # a weaker denoiser
    classifier: Any = None
    clip: Any = None
    codec: Any = None  # decodes the images for CLIP


ProgressCallback = Callable[[int, int], None]  # (steps done, steps in all)


class Denoised(NamedTuple):
    """Where the loop ended, and for each intermediate step x where it starts, and its D."""

    latents: BatchArray
    intermediates: list[tuple[Float[NDArray, "b *d"], Float[NDArray, "b *d"]]]


class StartLevel(NamedTuple):
    """What the steps of each image begin from: alpha x0 + sigma eps, x0 the latents given."""

    sigma: Float[Array, "b"]
    alpha: Float[Array, "b"] | None = None  # None: no latents are given


NO_TARGETS = GuidanceTargets()


class PerImage(NamedTuple):
    """What each image of a batch has of its own, beside its conditioning; on the host."""

    grid: TimestepGrid
    start: StartLevel
    scales: GuidanceScales
    keys: Key[Array, "b"]
    targets: GuidanceTargets = NO_TARGETS


class LoopInputs(NamedTuple):
    """What the sampling loop of a batch reads; arrays are on the devices, but for `own`."""

    own: PerImage
    noise: BatchArray
    conditioning: ConditioningPair
    given: BatchArray | None = None  # latents to begin with
    mask: BatchArray | None = None  # 0 where those stay


CHUNK_S = 0.5  # how long the loop runs between two looks at the clock and at Ctrl-C


class CompiledModel:
    """Compiled programs over the devices of a layout; weights are passed in, never compiled in.

    Images, noise and latents are in the form of the layout, which `shard` gives them and `gather`
    takes from them; other arrays are of the host. A batch must be a multiple of `num_shards`.
    """

    offloads_text = False  # whether the text encoders are on the devices only to encode prompts
    weights_version = 0  # of text encoders and denoiser: another number for other weights

    def __init__(
        self,
        family: Family,
        text_encoders: Sequence[Any],
        network: Any,  # the adapter of the denoiser
        codec: LatentCodec,
        *,
        layout: Layout,
    ) -> None:
        self.layout, self.num_shards = layout, layout.num_shards
        self.shard, self.gather = layout.shard, layout.gather
        self._auxiliary = Networks(None)
        self.image_processor: CLIPImageProcessor | None = None
        self._family = family
        self._network = layout.network(network)
        device = layout.devices[0].device_kind
        self._network_options = compiler_options(device, transformer=network.is_transformer)
        self.set_weights(text_encoders, network.module)
        self._codec = layout.split(upcast_fp16(cast(Any, codec)))
        # float32 means all of its bits: TPUs and recent GPUs multiply in fewer by default.
        exact = all(w.dtype == jnp.float32 for w in param_dict(network.module).values())
        self._precision = "highest" if exact else None
        self._programs: dict[Any, CompiledFunction] = {}

    def set_weights(self, text_encoders: Sequence[Any], network: nnx.Module) -> None:
        """Use the weights that these modules have now; programs are kept."""
        self.weights_version += 1
        self._texts = [self.layout.split(encoder) for encoder in text_encoders]
        self._denoiser = self._network, param_dict(network)

    def set_auxiliary_models(
        self,
        *,
        guidance_model: "CompiledModel | None" = None,
        classifier: LatentClassifier | None = None,
        clip: CLIPModel | None = None,
        image_processor: CLIPImageProcessor | None = None,
    ) -> None:
        """Use these networks in the loop from now on, instead of earlier ones."""
        self._auxiliary = Networks(
            denoiser=None,
            guidance_model=None if guidance_model is None else guidance_model._denoiser,
            classifier=None if classifier is None else self.layout.split(classifier),
            clip=None if clip is None else self.layout.split(clip),
            codec=None if clip is None else self._codec,
        )
        self.image_processor = image_processor

    @property
    def compile_s(self) -> float:
        """Seconds that compiling has taken so far."""
        return sum(program.compile_s for program in self._programs.values())

    @property
    def compilations(self) -> int:
        """How many programs have been compiled so far."""
        return sum(program.compilations for program in self._programs.values())

    def program(
        self, function: Callable[..., Any], per_image: str, **static: Any
    ) -> CompiledFunction:
        """The program of `function` with `static` choices; arguments "b" of a batch, "." not."""
        key = (function, tuple(static.items()))
        if key not in self._programs:
            chosen = functools.partial(function, **static)
            own = [letter == "b" for letter in per_image]
            options = self._network_options if function is denoise_steps else None
            self._programs[key] = CompiledFunction(
                chosen, own, self.layout, precision=self._precision, options=options
            )
        return self._programs[key]

    def encode(
        self, prompts: TokenizedPrompts | EncodedPrompts, extras: ExtraInputs, *, skip: int
    ) -> Conditioning:
        """The conditioning of the network, on the devices for `denoise`."""
        conditioning = self.shard(self._family.request_conditioning(extras))
        if isinstance(prompts, EncodedPrompts):
            return self.shard(prompts.conditioning) | conditioning
        return self.encode_text(prompts, skip=skip) | conditioning

    def text_encoders_on_devices(self) -> contextlib.AbstractContextManager[None]:
        """A context in which the text encoders are on the devices, as here they always are."""
        return contextlib.nullcontext()

    def encode_text(self, prompts: TokenizedPrompts, *, skip: int) -> Conditioning:
        """The texts' part of the conditioning."""
        if not self._texts:
            return {}
        encoders, params = zip(*self._texts, strict=True)
        program = self.program(
            encode_prompts, ".b", encoders=encoders, family=self._family, skip=skip
        )
        return program(params, self.shard(prompts))

    def latents(self, images: BatchArray) -> BatchArray:
        """The scaled mean latents of images in [-1, 1]."""
        codec, params = self._codec
        return self.program(_latents, ".b", codec=codec)(params, images)

    def noise(
        self, keys: Key[Array, "b"], shape: tuple[int, ...], *, step: int = INITIAL_NOISE_STEP
    ) -> BatchArray:
        """The unit-variance noise that each image starts from, or that of another `step`."""
        float32 = jnp.dtype(jnp.float32)
        program = self.program(step_noise, "b", step=step, shape=shape, dtype=float32)
        return program(self.shard(keys))

    def denoise(
        self,
        inputs: LoopInputs,
        *,
        sampler: Sampler,
        rule: Guidance,
        callback: ProgressCallback | None = None,
        intermediate_steps: Collection[int] = (),
    ) -> Denoised:
        """Latents after the steps `grid.first` ... `grid.last` - 1 of each image.

        In chunks of about CHUNK_S seconds; each of the `intermediate_steps`, which all images run,
        is one of its own. With a mask the latents given stay where it is 0.
        """
        first, last = np.asarray(inputs.own.grid.first), np.asarray(inputs.own.grid.last)
        loop = SamplingLoop(self, inputs, sampler=sampler, rule=rule)
        state, count = loop.begin(), int(np.max(last - first))  # of the image with the most steps
        recorder = StepRecorder(intermediate_steps, first) if intermediate_steps else None
        done, chunk = 0, 1
        while done < count:
            stop = min(done + chunk, count)
            if recorder is not None:
                stop = recorder.next_stop(done, stop, lambda x=state.x: self.gather(x))
            state, ran = loop.run(state, done, stop)
            chunk = max(1, int(CHUNK_S * (stop - done) / max(ran, 1e-6)))
            if recorder is not None:
                recorder.after(done, lambda x0=state.x0: self.gather(x0))
            done = stop
            if callback:
                callback(done, count)
        return Denoised(state.x, [] if recorder is None else recorder.pairs())

    def networks(self, rule: Guidance, targets: GuidanceTargets) -> tuple[Networks, Networks]:
        """The networks that are needed, and their weights."""
        needed = {
            "denoiser": self._denoiser,
            "guidance_model": self._auxiliary.guidance_model
            if any(s.network == "guidance_model" for s in rule.streams)
            else None,
            "classifier": self._auxiliary.classifier if targets.classifier else None,
            "clip": self._auxiliary.clip if targets.clip else None,
            "codec": self._auxiliary.codec if targets.clip else None,
        }
        halves = {name: (None, None) if pair is None else pair for name, pair in needed.items()}
        networks, params = ({n: pair[i] for n, pair in halves.items()} for i in (0, 1))
        return Networks(**networks), Networks(**params)

    def decode(self, latents: BatchArray) -> tuple[BatchArray, BatchArray]:
        """Images (uint8), or embeddings, of scaled latents, and which of them are finite."""
        codec, params = self._codec
        return self.program(decode_images, ".b", codec=codec)(params, latents)


class SamplingLoop:
    """The compiled steps of a batch, and what they read, on the devices."""

    def __init__(
        self,
        model: CompiledModel,
        inputs: LoopInputs,
        *,
        sampler: Sampler,
        rule: Guidance,
        uniform: bool = False,
    ) -> None:
        layout, (networks, self._params) = model.layout, model.networks(rule, inputs.own.targets)
        layout.check_streams(len(inputs.own.keys), rule)
        self._layout, self._rule = layout, layout.replicate(jax.tree.map(np.float32, rule))
        self._first_program = model.program(init_latents, "bbb.", sampler=sampler)
        self.place(inputs)
        self._program = model.program(
            denoise_steps,
            "..bbbbbbb..",
            networks=networks,
            image_processor=model.image_processor,
            sampler=sampler,
            uniform=uniform,
        )

    def place(self, inputs: LoopInputs) -> None:
        """Read these inputs from now on, which are of the same kind as those before."""
        self._grid, start, scales, keys, targets = self._layout.shard(inputs.own)
        known = (inputs.given, inputs.noise, inputs.mask)
        mask = None if inputs.mask is None else InpaintingMask(*cast(Any, known))
        self._first = inputs.noise, inputs.given, start
        self._fixed, self._others = (inputs.conditioning, scales), (keys, mask, targets)

    def begin(self) -> SamplingState:
        """The state of each image before its first step."""
        return self._first_program(*self._first, self._rule)

    def go_to(self, first: Int[NDArray, "b"]) -> None:
        """Count the steps of each image from `first`."""
        self._grid = self._grid._replace(first=self._layout.shard(first))

    def run(self, state: SamplingState, start: int, stop: int) -> tuple[SamplingState, float]:
        """The state after steps `start` to `stop`, as `run_steps` counts them; seconds of them."""
        began, compiled = time.perf_counter(), self._program.compile_s
        bounds = self._layout.replicate((np.int32(start), np.int32(stop)))
        state = self._program(
            self._params, self._rule, state, *self._fixed, self._grid, *self._others, *bounds
        )
        jax.block_until_ready(state)
        return state, time.perf_counter() - began - (self._program.compile_s - compiled)


def _latents(params: PyTree, images: Array, *, codec: Callable[[PyTree], LatentCodec]) -> Array:
    own = codec(params)
    return own.scale(own.encode(images)[0])


def init_latents(
    noise: Array,
    given: Array | None,
    start: StartLevel,
    rule: Guidance,
    *,
    sampler: Sampler,
) -> SamplingState:
    """The state before the first step, from noise and the latents `given`."""
    if given is None or start.alpha is None:
        x = per_image(start.sigma, noise) * noise
    else:
        x = add_noise(given, noise, start.alpha, start.sigma)
    return init_state(x, sampler=sampler, guidance_state=rule.init_state(x))


def denoise_steps(
    params: Networks,
    rule: Guidance,
    state: SamplingState,
    conditioning: ConditioningPair,
    scales: GuidanceScales,
    grid: TimestepGrid,
    keys: Array,
    inpainting_mask: InpaintingMask | None,
    targets: GuidanceTargets,
    start: Array,
    stop: Array,
    *,
    networks: Networks,
    image_processor: CLIPImageProcessor | None,
    sampler: Sampler,
    uniform: bool = False,
) -> SamplingState:
    """The state after the steps from `start` to `stop`, as `run_steps` counts them."""
    denoise = guided(
        params,
        rule,
        conditioning,
        scales,
        networks,
        variance=sampler.reads_variance,
        uniform=uniform,
    )
    if targets.classifier is not None or targets.clip is not None:
        names = ("classifier", "clip", "codec")
        pairs = {name: (getattr(networks, name), getattr(params, name)) for name in names}
        models = {name: own and own(weights) for name, (own, weights) in pairs.items()}
        denoise, sampler = with_models(denoise, sampler, targets, image_processor, **models)
    return run_steps(
        denoise,
        state,
        grid,
        keys,
        start,
        stop,
        sampler=sampler,
        guidance_phase=rule.phase,
        inpainting_mask=inpainting_mask,
    )


def guided(
    params: Networks,
    rule: Guidance,
    conditioning: ConditioningPair,
    scales: GuidanceScales,
    networks: Networks,
    *,
    variance: bool = False,
    uniform: bool = False,
) -> Denoiser:
    """The denoiser of the network, guided by a rule; with the `variance` that it learns, if any.

    For `uniform` see `guidance.modes`.
    """
    network, weaker, guide = networks.denoiser, networks.guidance_model, None
    if weaker is not None:
        guide = ConditionedNetwork(
            weaker, params.guidance_model, conditioning.guidance_model, weaker.prediction_type
        )
    return guided_denoiser(
        network,
        params.denoiser,
        conditioning.main,
        scales,
        rule=rule,
        prediction_type=network.prediction_type,
        guidance_model=guide,
        variance=variance and network.learns_variance,
        uniform=uniform,
    )


def decode_images(
    params: PyTree, latents: Array, *, codec: Callable[[PyTree], LatentCodec]
) -> tuple[Array, Array]:
    """Images (uint8), or embeddings, of scaled latents, and which of them are finite."""
    own = codec(params)
    images = own.decode(own.unscale(latents))
    finite = jnp.isfinite(images).reshape(len(images), -1).all(axis=1)
    if images.ndim == 2:
        return images, finite
    return jnp.round(jnp.clip(images / 2 + 0.5, 0, 1) * 255).astype(jnp.uint8), finite
