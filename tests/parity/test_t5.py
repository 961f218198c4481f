"""T5's encoder against transformers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from copier import agree, copy, randomise

from jaxdiff.checkpoints.components import read_component, write_component
from jaxdiff.checkpoints.configs import from_transformers
from jaxdiff.models.t5.config import T5Config
from jaxdiff.models.t5.module import T5EncoderModel, relative_position_buckets

FIELDS = {
    "vocab_size": 50,
    "d_model": 24,
    "d_kv": 6,  # not d_model / num_heads
    "d_ff": 40,
    "num_layers": 3,
    "num_heads": 2,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 10,
    "feed_forward_proj": "gated-gelu",
}
IDS = np.array([[4, 9, 30, 7, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0], [*range(5, 18), 1]])
MASK = IDS != 0


def theirs_of(seed=0, **changes):
    theirs = randomise(transformers.T5EncoderModel(transformers.T5Config(**FIELDS | changes)), seed)
    bias = theirs.encoder.block[0].layer[0].SelfAttention.relative_attention_bias
    with torch.no_grad():
        bias.weight.mul_(3)  # so that distances count
    return theirs


def config_of(theirs):
    return from_transformers(T5Config, theirs.config.to_dict(), source="t5")


def ours_of(theirs, **options):
    tensors = dict(theirs.state_dict())
    tied = tensors.pop("encoder.embed_tokens.weight")
    assert torch.equal(tied, tensors["shared.weight"])
    return copy(Tensors(tensors), T5EncoderModel, config_of(theirs), **options)


class Tensors:
    def __init__(self, tensors):
        self.state_dict = lambda: tensors


@pytest.mark.parametrize("form", ["gated-gelu", "relu"])
def test_padding_takes_part_unless_it_is_masked(form):
    theirs = theirs_of(feed_forward_proj=form)
    ours = ours_of(theirs)
    ids = jnp.asarray(IDS, jnp.int32)
    plain = jax.jit(lambda ids: ours.features(ids))(ids)
    agree(plain.last, theirs(torch.from_numpy(IDS)).last_hidden_state)
    np.testing.assert_array_equal(plain.mask, MASK)
    masked = jax.jit(lambda ids: ours.features(ids, masks_padding=True))(ids)
    out = theirs(torch.from_numpy(IDS), attention_mask=torch.from_numpy(MASK)).last_hidden_state
    agree(masked.last, out)
    assert np.abs(np.asarray(plain.last - masked.last))[0, :5].max() > 1e-2
    agree(ours(ids), theirs(torch.from_numpy(IDS)).last_hidden_state)


@pytest.mark.parametrize("skip", [1, 2])
def test_skipped_layers(skip):
    theirs = theirs_of()
    out = theirs(torch.from_numpy(IDS), output_hidden_states=True)
    expected = theirs.encoder.final_layer_norm(out.hidden_states[-1 - skip])
    agree(ours_of(theirs).features(jnp.asarray(IDS, jnp.int32), skip).last, expected)


@pytest.mark.parametrize(("buckets", "distance"), [(32, 128), (8, 10), (16, 512)])
def test_buckets(buckets, distance):
    offset = torch.arange(700)[None] - torch.arange(700)[:, None]
    theirs = transformers.models.t5.modeling_t5.T5Attention._relative_position_bucket(
        offset, num_buckets=buckets, max_distance=distance
    )
    ours = relative_position_buckets(700, num_buckets=buckets, max_distance=distance)
    np.testing.assert_array_equal(ours, theirs.numpy())


def overflowing(theirs):
    """Weights in the range of float16 whose feed-forward outputs are beyond it."""
    with torch.no_grad():
        for block in theirs.encoder.block:
            block.layer[1].DenseReluDense.wo.weight.mul_(60_000)
    return theirs


def test_float16_where_sums_leave_its_range():
    """The stored weights are float16; transformers holds `wo` and the sums in float32 too."""
    theirs = overflowing(theirs_of()).to(torch.float16)
    for module in theirs.modules():
        if isinstance(module, transformers.models.t5.modeling_t5.T5DenseGatedActDense):
            module.wo.float()
    out = theirs(torch.from_numpy(IDS), output_hidden_states=True)
    assert torch.isfinite(out.last_hidden_state).all()
    assert max(float(state.detach().abs().max()) for state in out.hidden_states[:-1]) > 65504
    options = {"dtype": jnp.float16, "param_dtype": jnp.float16}
    ours = ours_of(theirs, **options).features(jnp.asarray(IDS, jnp.int32)).last
    assert ours.dtype == jnp.float16
    assert np.isfinite(ours).all()
    exact = theirs.float()(torch.from_numpy(IDS)).last_hidden_state
    agree(ours, exact, 1e-2)


def test_folders_go_both_ways(tmp_path):
    theirs = theirs_of()
    theirs.save_pretrained(tmp_path / "a", max_shard_size="10KB")
    assert (tmp_path / "a/model.safetensors.index.json").is_file()  # in shards
    component = read_component(tmp_path / "a")
    assert isinstance(component.module, T5EncoderModel)
    ids = jnp.asarray(IDS, jnp.int32)
    expected = theirs(torch.from_numpy(IDS)).last_hidden_state
    agree(component.module.features(ids).last, expected)
    write_component(tmp_path / "b", component)
    again, report = transformers.T5EncoderModel.from_pretrained(
        tmp_path / "b", output_loading_info=True
    )
    assert not any(report.values())
    assert torch.equal(again(torch.from_numpy(IDS)).last_hidden_state, expected)
