"""Training a diffusion model: its network, text encoders, LoRA or textual inversion."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp

from jaxdiff.checkpoints.pipelines import IMAGE_ENCODER
from jaxdiff.checkpoints.training_state import has_checkpoint
from jaxdiff.core.errors import InputError
from jaxdiff.core.types import Array, Dtype, NDArray, dtype_of
from jaxdiff.data.latent_records import read_null
from jaxdiff.data.latents import LatentCacheInfo
from jaxdiff.data.texts import CaptionTokenizer
from jaxdiff.experiments.base_model import (
    BaseModel,
    caption_shapes,
    check_initial_weights,
    frozen_shapes,
    load_base_model,
    place_frozen,
    size_shapes,
)
from jaxdiff.experiments.evaluation import captioned_images, make_evaluation
from jaxdiff.experiments.experiment import (
    CHECKPOINTS,
    GRID_SIZE,
    Experiment,
    ModelSource,
    Samples,
    Wiring,
    grid_prompts,
    image_grid,
    image_shapes,
    shard_or_replicate,
    training_batches,
    validation_batch,
)
from jaxdiff.experiments.latent_cache import check_latent_cache, read_latent_cache
from jaxdiff.experiments.prior_preservation import prior_preservation_batches
from jaxdiff.experiments.priors import check_evaluation, embedding_cosine, with_statistics
from jaxdiff.experiments.procedural import image_side
from jaxdiff.experiments.sample_grid import make_sampler, sampling_inputs
from jaxdiff.experiments.training_methods import make_partition, make_training_method
from jaxdiff.families.image_embeddings import IMAGE_EMBEDS
from jaxdiff.families.text_outputs import cached_columns, output_shapes
from jaxdiff.parallel.distributed import gather_to_host
from jaxdiff.training.config import (
    PROCEDURAL_KINDS,
    DataConfig,
    DiffusionObjective,
    TrainConfig,
)
from jaxdiff.training.objectives.diffusion import (
    Frozen,
    LatentDiffusion,
    ParameterPartition,
    diffusion_task,
)
from jaxdiff.training.objectives.image_columns import embedding_columns
from jaxdiff.training.objectives.trainable import frozen_networks_used
from jaxdiff.training.step import Params


def _image_size(data: DataConfig, info: LatentCacheInfo | None) -> int:
    """Side of the (square) images in pixels."""
    if data.kind in PROCEDURAL_KINDS:
        return image_side(data)
    return (data.resolution or 0) if info is None else info.resolution


def _check_caches(
    config: TrainConfig, base: BaseModel, partition: ParameterPartition
) -> LatentCacheInfo | None:
    """The latent cache of the data; InputError unless prior_data are cached in the same way."""
    info, prior = check_latent_cache(config.data, base, partition), base.objective.prior_data
    if prior is not None:
        other = check_latent_cache(prior, base, partition, field="objective.prior_data")
        prior_text, text = (
            (x.text_embedding_shapes, x.dtype) if x and x.text_embedding_shapes else ()
            for x in (other, info)
        )
        if prior_text != text:
            kinds = (f"embeddings in {x[1]}" if x else "captions" for x in (prior_text, text))
            raise InputError(
                "objective.prior_data: got data with {}, expected {} as data has".format(*kinds)
            )
    return info


def _check_size(config: TrainConfig, base: BaseModel, side: int) -> None:
    """InputError unless the network is for the latents of images of `side` pixels.

    The network of a pipeline may be trained at another size than before.
    """
    downscale, got = base.codec.config.downscale, base.objective.model.sample_size
    if config.data.kind in PROCEDURAL_KINDS:
        image_side(config.data, downscale)
    from_pipeline = cast(DiffusionObjective, config.objective).pipeline is not None
    any_size = from_pipeline or base.family.embeddings is not None
    if not any_size and got != side // downscale:
        raise InputError(
            f"objective.model.sample_size: got {got}, expected {side // downscale} as the latents "
            f"of {base.objective.vae} have"
        )


def _prompts(config: TrainConfig, caption_tokenizer: CaptionTokenizer) -> list[str]:
    """The prompts of the sample grids; InputError if none has the placeholder token."""
    prompts = grid_prompts(config)
    for token in caption_tokenizer.placeholder_tokens:
        if not any(token in (caption_tokenizer.caption or prompt) for prompt in prompts):
            raise InputError(
                f"objective.trainable.placeholder_token: got {token!r}, which no caption has, "
                "expected captions with it, such as a data.caption"
            )
    return prompts


def wire_diffusion(config: TrainConfig, dtype: Dtype, models: ModelSource) -> Wiring:
    """The training of `objective.trainable` as shapes."""
    base = load_base_model(cast(DiffusionObjective, config.objective), models)
    info = read_latent_cache(config)
    return _wire(config, base, make_partition(base, dtype), info, dtype)


def _wire(
    config: TrainConfig,
    base: BaseModel,
    partition: ParameterPartition,
    info: LatentCacheInfo | None,
    dtype: Dtype,
) -> Wiring:
    family, latents = base.family, config.data.kind == "latents"
    if latents and base.image_encoder is not None:
        raise InputError(
            f"data.kind: got latents for {family.name}, expected images, whose embeddings it needs"
        )
    encodings = _text_embedding_shapes(config, base, info, dtype)
    names = partition.frozen
    if not config.sample_every:
        names = frozen_networks_used(partition, latents=latents, text_encodings=bool(encodings))
    frozen = frozen_shapes(base, names, dtype)

    def batch(n: int) -> dict[str, jax.ShapeDtypeStruct]:
        shapes = {
            name: jax.ShapeDtypeStruct((n, *x.shape), x.dtype) for name, x in encodings.items()
        }
        shapes = shapes or caption_shapes(base, n)
        if (
            any(e.argument == "time_ids" for e in family.extras)
            or config.data.kind not in PROCEDURAL_KINDS
        ):
            shapes |= size_shapes(n)
        if base.objective.prior_data is not None:
            shapes["weight"] = jax.ShapeDtypeStruct((n,), jnp.float32)
        if not latents:
            return image_shapes(config, n) | shapes
        side = base.objective.model.sample_size
        sides = side if isinstance(side, tuple) else (side or 0,) * 2
        if info is not None:
            sides = (info.resolution // info.downscale,) * 2
        channels = base.codec.config.latent_channels
        moments = jax.ShapeDtypeStruct((n, *sides, channels), jnp.float32)
        return {"mean": moments, "logvar": moments} | shapes

    return Wiring(
        diffusion_task(base.objective, partition, base.image_processor),
        frozen._replace(null=encodings) if encodings else frozen,
        batch,
    )


def _text_embedding_shapes(
    config: TrainConfig, base: BaseModel, info: LatentCacheInfo | None, dtype: Dtype
) -> dict[str, jax.ShapeDtypeStruct]:
    """The embeddings of a caption: those of the cache, or in `dtype` as one would have them."""
    if info is not None:
        stored = dtype_of(info.dtype)
        shapes = info.text_embedding_shapes.items()
        return {name: jax.ShapeDtypeStruct(shape, stored) for name, shape in shapes}
    if not config.data.text_embeddings:
        return {}
    outputs = output_shapes(base.family, base.networks)
    columns = jax.eval_shape(functools.partial(cached_columns, base.family), outputs)
    return {name: jax.ShapeDtypeStruct(x.shape[1:], dtype) for name, x in columns.items()}


def diffusion_experiment(config: TrainConfig, workdir: pathlib.Path, dtype: Dtype) -> Experiment:
    """Sample grids of fixed prompts; evaluation: the validation loss, and see `make_evaluation`."""
    resumed = has_checkpoint(workdir / CHECKPOINTS)
    base = load_base_model(cast(DiffusionObjective, config.objective))
    method = make_training_method(base, dtype, config.data.caption)
    caption_tokenizer, objective = method.caption_tokenizer, base.objective
    check_initial_weights(config, resumed=resumed)
    partition, is_prior = method.partition, base.family.embeddings is not None
    if is_prior:
        check_evaluation(objective)
        objective = dataclasses.replace(objective, num_eval_images=0)
    if is_prior and base.begins_at_random:
        partition = with_statistics(partition, base, config)
    info = _check_caches(config, base, partition)
    side = _image_size(config.data, info)
    _check_size(config, base, side)
    wiring = _wire(config, base, partition, info, dtype)
    null = base.null_ids(caption_tokenizer)
    encoded = info if info is not None and info.text_embedding_shapes else None
    tokenizer = caption_tokenizer if encoded is None else None
    model = LatentDiffusion(partition, objective.prediction_type)
    generate = jax.jit(
        make_sampler(
            model,
            objective.schedule,
            steps=objective.sample_steps,
            guidance_scale=objective.sample_guidance_scale,
            clipping=base.clipping,
            image_processor=base.image_processor,
        )
    )
    eval_metrics = jax.jit(wiring.task.eval_metrics)

    @jax.jit
    def embed(params: Params, frozen: Frozen, inputs: Mapping[str, Array]) -> Array:
        encoders = model.build_encoders(model.merge_weights(params, frozen))
        encoder, processor = encoders[IMAGE_ENCODER], cast(Any, base.image_processor)
        return embedding_columns(encoder, processor, inputs["image"])[IMAGE_EMBEDS]

    def load_frozen(shardings: Frozen) -> Frozen:
        folder = pathlib.Path(str(config.data.path))
        step_null = null if encoded is None else read_null(folder, encoded)
        return place_frozen(base, dtype, shardings, step_null)

    def make_inputs(captions: Sequence[str], images: Callable[[], NDArray]) -> dict[str, NDArray]:
        return caption_tokenizer(captions) | sampling_inputs(base, side, len(captions), images)

    validation = validation_batch(config, tokenizer)
    prompts = _prompts(config, caption_tokenizer)
    grid_inputs = shard_or_replicate(
        make_inputs(prompts, lambda: captioned_images(config, prompts, validation))
    )
    batch = shard_or_replicate(validation)
    resolved = dataclasses.replace(config, objective=objective)
    evaluate = make_evaluation(resolved, make_inputs, base.codec, validation)

    def sample(params: Params, frozen: Frozen) -> Samples:
        def images_of(inputs: Mapping[str, Array]) -> Array:
            return generate(params, frozen._replace(null=null), inputs)

        metrics = jax.device_get(eval_metrics(params, frozen, batch, jax.random.key(0)))
        if is_prior:
            real, b = functools.partial(embed, params, frozen), len(validation["image"])
            inputs = validation | sampling_inputs(base, side, b, lambda: validation["image"])
            metrics["embedding_cosine"] = embedding_cosine(images_of, real, inputs)
            grid = None
        else:
            metrics |= evaluate(images_of, frozen.weights.get(str(base.family.latent_codec), {}))
            grid = image_grid(gather_to_host(images_of(grid_inputs)), GRID_SIZE // 2)
        found = {f"validation_{name}": float(value) for name, value in metrics.items()}
        return Samples(found, grid)

    if objective.prior_data is None:
        stream = training_batches(config, tokenizer)
    else:
        stream = prior_preservation_batches(
            config, objective.prior_data, objective.prior_loss_weight, tokenizer
        )
    return Experiment(
        wiring, load_frozen, stream, sample, method.export, base_model_identity(config, base)
    )


def base_model_identity(config: TrainConfig, base: BaseModel) -> dict[str, Any]:
    """The resume identity of the base model."""
    identity: dict[str, Any] = {
        f"weights of {name}": digest for name, digest in base.digests.items()
    }
    objective = cast(DiffusionObjective, config.objective)
    if objective.pipeline is None:
        return identity
    values = {name: getattr(base.objective, name) for name in ("model", "schedule")}
    for name, value in values.items():
        fields = dataclasses.asdict(value)
        identity |= {f"objective.{name}.{key}": item for key, item in fields.items()}
    return identity | {"objective.prediction_type": base.objective.prediction_type}
