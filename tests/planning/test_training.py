"""Plans have the shapes of trainings: each is compared with the real one, made of files."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
import tiny
from captioned_images import write_folder

from jaxdiff.checkpoints.embedded import EMBEDDED
from jaxdiff.checkpoints.jsonfiles import read_object
from jaxdiff.cli import main
from jaxdiff.experiments import experiment as module
from jaxdiff.experiments.train import experiment, wire
from jaxdiff.models.classifier import LatentClassifierConfig
from jaxdiff.models.vae import AutoencoderKLConfig
from jaxdiff.parallel.mesh import data_mesh
from jaxdiff.parallel.sharding import infer_shardings
from jaxdiff.planning.published_models import PUBLISHED
from jaxdiff.profiling.flops import gradient_flops
from jaxdiff.scenes.labels import ATTRIBUTES
from jaxdiff.training.config import (
    ClassifierObjective,
    DataConfig,
    DiffusionObjective,
    DistillationObjective,
    LoRA,
    TrainConfig,
    VAEObjective,
)

CLASSIFIER = LatentClassifierConfig(
    sample_size=32,
    in_channels=4,
    block_out_channels=(8,),
    layers_per_block=1,
    attention_head_dim=4,
    norm_num_groups=2,
).with_labels(ATTRIBUTES)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Models and pictures."""
    folder = tmp_path_factory.mktemp("abstract")
    tiny.write_tiny(folder / "sd")
    tiny.write_xl(folder / "xl")
    write_folder(folder / "in", 20, sizes=((16, 16),))
    return folder


@pytest.fixture(scope="module")
def latents(folder):
    """The pictures cached with what text encoders say of their captions."""
    pictures = ["--path", str(folder / "in"), "--resolution", "16", "--cell", "16"]
    command = [str(folder / "xl"), str(folder / "latents"), "--kind", "folder", *pictures]
    assert main.run("cache-latents", [*command, "--texts", "embeddings"]) == 0
    return str(folder / "latents")


def vae_of(folder):
    """A decoder learnt from what a CLIP sees."""
    raw = read_object(folder / "sd" / "vae" / "config.json")
    names = {field.name for field in dataclasses.fields(AutoencoderKLConfig)}
    values = {n: tuple(v) if isinstance(v, list) else v for n, v in raw.items() if n in names}
    return VAEObjective(
        model=AutoencoderKLConfig(**values),
        weights=str(folder / "sd" / "vae"),
        freeze_encoder=True,
        perceptual_model=str(EMBEDDED),
    )


OBJECTIVES = {
    "vae": (vae_of, "folder"),
    "classifier": (
        lambda folder: ClassifierObjective(vae=str(folder / "sd" / "vae"), model=CLASSIFIER),
        "scenes",
    ),
    "distillation": (lambda folder: DistillationObjective(teacher=str(folder / "sd")), "folder"),
    "pictures": (lambda folder: DiffusionObjective(pipeline=str(folder / "xl")), "folder"),
    "cached": (
        lambda folder: DiffusionObjective(pipeline=str(folder / "xl"), trainable=LoRA(rank=2)),
        "latents",
    ),
}


def shaped(tree):
    """Shapes and dtypes of a tree."""
    return jax.tree.map(lambda leaf: (tuple(leaf.shape), jnp.dtype(leaf.dtype).name), tree)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_plan_has_the_shapes_of_the_training(folder, tmp_path, monkeypatch, request, name):
    monkeypatch.setattr(module, "VALIDATION_BATCH", 8)
    make, kind = OBJECTIVES[name]
    if kind == "scenes":
        data = DataConfig()
    elif kind == "latents":
        data = DataConfig(kind="latents", path=request.getfixturevalue("latents"))
    else:
        data = DataConfig(kind="folder", path=str(folder / "in"), resolution=16, bucket_multiple=16)
    config = TrainConfig(objective=make(folder), data=data, batch_size=8, steps=1, dtype="bfloat16")
    real = experiment(config, tmp_path)
    batch, found = next(real.batches), real.wiring
    real.batches.close()
    assert not list(tmp_path.iterdir())
    with monkeypatch.context() as patch:
        for place in ("components.find_weights", "components.read_weights"):
            patch.setattr(f"jaxdiff.checkpoints.{place}", lambda *_, **__: pytest.fail("read"))
        plan = wire(config, PUBLISHED)
    assert shaped(plan.task.shapes) == shaped(found.task.shapes)
    assert shaped(plan.frozen) == shaped(found.frozen)
    places = infer_shardings(found.frozen, data_mesh())
    assert shaped(real.load_frozen(places)) == shaped(plan.frozen)
    planned = plan.batch(8)
    read = {name: batch[name] for name in planned}
    assert shaped(planned) == shaped(read)
    # what the step does not read of a batch
    assert batch.keys() - planned.keys() <= {"time_ids", "ids"}
    key = jax.eval_shape(lambda: jax.random.key(0))
    flops = [
        gradient_flops(parts.task.loss, parts.task.shapes, parts.frozen, given, key)
        for parts, given in ((plan, planned), (found, batch))
    ]
    assert flops[0] == flops[1] > 0
