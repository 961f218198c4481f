import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import jaxdiff
from jaxdiff.checkpoints.components import Component, write_component
from jaxdiff.checkpoints.jsonfiles import write_object
from jaxdiff.core.configs import to_mapping
from jaxdiff.models.build import abstract, param_dict, with_params
from jaxdiff.models.classifier import LatentClassifier, LatentClassifierConfig
from jaxdiff.models.clip import CLIPModel
from jaxdiff.models.clip_config import CLIPVisionConfig
from jaxdiff.models.prompt_labels import PROMPT_LABELS
from jaxdiff.scenes.labels import ATTRIBUTES, GRAMMAR


@pytest.fixture(scope="session")
def pipe(tmp_path_factory):
    """The tiny model on all 8 fake devices."""
    return jaxdiff.load(tiny.write_tiny(tmp_path_factory.mktemp("model") / "tiny"))


@pytest.fixture(scope="session")
def one_device(pipe):
    """The same model on one device."""
    return tiny.first_devices(pipe, 1)


@pytest.fixture(scope="session")
def single(one_device):
    """The same model on one device, with a linear network for its UNet."""
    return tiny.with_linear_unet(one_device)


@pytest.fixture(scope="session")
def classifier(tmp_path_factory):
    """The folder of a classifier of noisy latents."""
    config = LatentClassifierConfig(
        in_channels=4,
        sample_size=8,
        block_out_channels=(8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=4,
    ).with_labels(ATTRIBUTES)
    folder = tmp_path_factory.mktemp("classifier") / "classifier"
    write_component(folder, tiny.random_component(LatentClassifier, config, seed=5))
    write_object(folder / PROMPT_LABELS, to_mapping(GRAMMAR))
    return folder


@pytest.fixture(scope="session")
def clip(tmp_path_factory, pipe):
    """The folder of a CLIP model."""
    text = pipe.text_encoder.config
    vision = CLIPVisionConfig(
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
    )
    module = abstract(CLIPModel, text, vision, 6)
    rng = np.random.default_rng(4)
    values = {
        path: jnp.asarray(rng.normal(size=leaf.shape) * 0.3 + path.endswith("scale"), leaf.dtype)
        for path, leaf in param_dict(module).items()
    }
    folder = tmp_path_factory.mktemp("clip") / "clip"
    write_component(folder, Component(module=with_params(module, values)))
    return folder
