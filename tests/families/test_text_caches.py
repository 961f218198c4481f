"""Columns of text caches: models of several text encoders, each with its own outputs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.core.trees import flatten
from jaxdiff.data.latents import LatentCacheInfo
from jaxdiff.data.texts import CaptionTokenizer
from jaxdiff.experiments.cache_texts import TextEncoders, make_text_encoder
from jaxdiff.families.base import Family, TextEncoder, TextEncoderOutput
from jaxdiff.families.text_outputs import cached_outputs, cached_text_columns
from jaxdiff.models.build import initialise
from jaxdiff.models.clip import CLIPTextModel
from jaxdiff.models.clip_config import CLIPTextConfig
from jaxdiff.models.t5.config import T5Config
from jaxdiff.models.t5.module import T5EncoderModel
from jaxdiff.models.unet.adapter import UNetAdapter
from jaxdiff.models.unet.module import UNet2DConditionModel
from jaxdiff.parallel.mesh import data_mesh

CLIP = {
    "vocab_size": 20,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 5,
    "eos_token_id": 19,
}


def clip(seed, width, projection, projects=True):
    config = CLIPTextConfig(hidden_size=width, projection_dim=projection, **CLIP)
    return initialise(CLIPTextModel, config, projects, seed=seed)


def t5():
    config = T5Config(vocab_size=20, d_model=8, d_kv=2, d_ff=10, num_layers=1, num_heads=2)
    return initialise(T5EncoderModel, config, seed=3)


# As Stable Diffusion 3 has them, and FLUX: (encoder of the family, module).
MODELS = {
    "clip-clip-t5": [
        (TextEncoder(layer="penultimate", pooled=True, max_chunks=1), lambda: clip(0, 8, 6)),
        (
            TextEncoder(component="text_encoder_2", layer="penultimate", pooled=True, max_chunks=1),
            lambda: clip(1, 4, 10),
        ),
        (TextEncoder(component="text_encoder_3", length=7, max_chunks=1), t5),
    ],
    "pooled-t5": [
        (TextEncoder(layer=None, pooled=True, max_chunks=1), lambda: clip(0, 8, 6, False)),
        (TextEncoder(component="text_encoder_2", length=7, max_chunks=1), t5),
    ],
    "masked-t5": [
        (TextEncoder(length=7, max_chunks=1, masks_padding=True, mask="context_mask"), t5),
    ],
}
SHAPES = {
    "clip-clip-t5": {
        "states": (5, 8),
        "states_2": (5, 4),
        "states_3": (7, 8),
        "pooled": (16,),
    },
    "pooled-t5": {"states_2": (7, 8), "pooled": (8,)},
    "masked-t5": {"states": (7, 8), "states_mask": (7,)},
}


class Words:
    """A tokenizer: each letter's number, then 19, then 0."""

    pad_token_id = unk_token_id = 0
    backend_tokenizer = None

    def __init__(self, length):
        self.model_max_length = length

    def __len__(self):
        return 20

    def __call__(self, texts, **_):
        rows = [[*(ord(c) % 15 + 1 for c in text)][: self.model_max_length - 1] for text in texts]
        pad = [0] * self.model_max_length
        return {"input_ids": [[*row, 19, *pad][: self.model_max_length] for row in rows]}

    def get_vocab(self):
        return {}

    def convert_tokens_to_ids(self, tokens):
        return [0 for _ in tokens]

    def add_tokens(self, new_tokens):
        return 0


@pytest.fixture(params=MODELS)
def model(request):
    """Name, family, modules, and the function that encodes captions for a cache."""
    specs, makers = zip(*MODELS[request.param], strict=True)
    family = Family(
        name="of the test",
        network="unet",
        network_class=UNet2DConditionModel,
        adapter=UNetAdapter,
        text_encoders=specs,
    )
    modules = {spec.component: make() for spec, make in zip(specs, makers, strict=True)}
    tokenizers = {spec.component: Words(spec.length or 5) for spec in specs}
    digests = tuple(modules)
    encoders = TextEncoders(
        family, modules, CaptionTokenizer(tokenizers=tokenizers), digests, digests
    )
    return request.param, family, modules, encoders


def test_columns_are_as_the_description_says(model):
    name, family, _, encoders = model
    found = make_text_encoder(encoders, 4, data_mesh(jax.devices()[:1]))(["abc", "", "de"])
    info = LatentCacheInfo(
        source="",
        vae="",
        resolution=8,
        downscale=8,
        channels=4,
        dtype="float32",
        heights=(),
        widths=(),
        items=(),
        **encoders.cache_info(),
    )
    assert {column: array.shape[1:] for column, array in found.items()} == SHAPES[name]
    assert info.text_embedding_shapes == SHAPES[name]
    assert set(cached_text_columns(family)) == set(SHAPES[name])


def test_a_cache_gives_what_the_encoders_give(model):
    _, family, modules, encoders = model
    captions = ["abc", "", "abcdefgh"]
    columns = make_text_encoder(encoders, 4, data_mesh(jax.devices()[:1]))(captions)
    arrays = {name: jnp.asarray(array) for name, array in columns.items()}
    got = cached_outputs(family, arrays, modules)
    ids = encoders.tokenize(captions)
    for spec, each in zip(family.text_encoders, got, strict=True):
        want = spec.encode(modules[spec.component], jnp.asarray(ids[spec.component]))
        assert isinstance(each, TextEncoderOutput)
        assert (each.hidden_states is None) == (spec.layer is None)
        assert (each.pooled is None) != spec.pooled
        assert (each.mask is None) == (spec.mask is None)
        for own, other in zip(jax.tree.leaves(each), jax.tree.leaves(want), strict=True):
            assert own.dtype == other.dtype
            np.testing.assert_allclose(own, other, rtol=1e-5, atol=1e-6)
    if spec.mask is not None:
        np.testing.assert_array_equal(each.mask.sum(axis=1), [4, 1, 7])  # with the end
    joined = flatten(family.text_conditioning(got)) if len(got) < 3 else {}
    assert set(joined) <= {"context", "text_embeds", "context_mask"}
