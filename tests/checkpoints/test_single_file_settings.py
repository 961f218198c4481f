"""What counts where a single file, its header and the .yaml beside it say different things."""

import dataclasses
import json
import warnings

import numpy as np
import originals
import pytest

from jaxdiff.checkpoints.description import describe
from jaxdiff.checkpoints.models import read_model
from jaxdiff.checkpoints.safetensors import LazyTensor, read_table, write_tensors
from jaxdiff.checkpoints.single_file import write_single_file
from jaxdiff.checkpoints.single_file_settings import read_layout
from jaxdiff.core.errors import InputError
from jaxdiff.diffusion.schedules import VPSchedule

UNET = "model.diffusion_model."
NONE = np.zeros(0, np.float32)
TEXTS = {"sd1": "cond_stage_model.transformer.x", "sd2": "cond_stage_model.model.x"}
MARKERS = {"v_pred": NONE, "ztsnr": NONE}


def few(family="sd1"):
    """As many tensors as tell the family."""
    return {
        f"{UNET}input_blocks.0.0.weight": np.zeros((320, 4, 3, 3), np.float16),
        f"{UNET}out.2.weight": np.zeros((4, 320, 3, 3), np.float16),
        f"{UNET}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": np.zeros((320, 768)),
        TEXTS[family]: NONE,
    }


def write(folder, tensors, note=None, text=None):
    path = folder / "model.safetensors"
    pending = {
        name: LazyTensor(dtype=a.dtype, shape=a.shape, fetch=lambda a=a: a)
        for name, a in tensors.items()
    }
    metadata = {} if note is None else {"modelspec.prediction_type": note}
    write_tensors(path, pending, metadata=metadata)
    if text is not None:
        path.with_suffix(".yaml").write_text(text)
    return path


def layout(folder, tensors=None, note=None, text=None, asked=None):
    path = write(folder, few() if tensors is None else tensors, note, text)
    return read_layout(path, read_table(path), asked)


def yaml_of(*params, unet=None, **sections):
    """An original config."""
    lines = ["model:", "  target: ldm.LatentDiffusion", "  params:"]
    lines += [f"    {line}" for line in params]
    if unet is not None:
        lines += ["    unet_config:", "      params:", "        use_checkpoint: True"]
        lines += [f"        {line}" for line in unet]
    for name, value in sections.items():
        lines += [f"    {name}: {json.dumps(value)}"]
    return "\n".join(lines)


V, EPS = yaml_of('parameterization: "v"'), yaml_of("linear_start: 0.00085", unet=())


@pytest.mark.parametrize(
    ("asked", "tensors", "text", "note", "wanted", "said"),
    [
        (None, {}, None, None, None, None),
        (None, {}, None, "epsilon", "epsilon", None),
        (None, {}, None, "v", "v_prediction", None),
        (None, {}, V, None, "v_prediction", None),
        (None, {}, V, "v", "v_prediction", None),
        (None, {}, EPS, "v", "epsilon", r"epsilon \(model.yaml\) and v_prediction \(modelspec"),
        (None, MARKERS, None, "epsilon", "v_prediction", r"v_prediction \(tensor v_pred\) and eps"),
        (None, MARKERS, EPS, "v", "v_prediction", r"v_pred\) and epsilon \(model.yaml\)"),
        ("sample", MARKERS, V, "v", "sample", r"sample \(as asked for\) and v_prediction \(tensor"),
        ("v_prediction", MARKERS, V, "v", "v_prediction", None),
        ("epsilon", {}, None, None, "epsilon", None),
    ],
)
def test_the_order_of_authority(tmp_path, asked, tensors, text, note, wanted, said):
    make = lambda: layout(tmp_path, few() | tensors, note, text, asked)  # noqa: E731
    if said is None:
        found = make()
    else:
        with pytest.warns(UserWarning, match=f"prediction_type: got .*{said}.*the first counts"):
            found = make()
    assert found.scheduler.get("prediction_type") == wanted
    assert found.scheduler.get("rescale_betas_zero_snr", False) == ("ztsnr" in tensors)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [(None, "v_prediction"), (EPS, "epsilon"), (V, "v_prediction")],
)
def test_the_two_kinds_of_stable_diffusion_2(tmp_path, text, wanted):
    found = layout(tmp_path, few("sd2"), text=text)
    assert found.scheduler["prediction_type"] == wanted
    assert found.fields["unet"]["sample_size"] == {"epsilon": 64, "v_prediction": 96}[wanted]
    assert describe(tmp_path / "model.safetensors").prediction_type == wanted


def test_what_else_a_yaml_says(tmp_path):
    params = ("linear_start: 1e-3", "linear_end: 0.02", "timesteps: 500", "scale_factor: 0.5")
    found = layout(tmp_path, text=yaml_of(*params, unet=["num_heads: 4", "model_channels: 320"]))
    wanted = {"beta_start": 0.001, "beta_end": 0.02, "num_train_timesteps": 500}
    assert {key: found.scheduler[key] for key in wanted} == wanted
    assert (found.scaling_factor, found.fields["unet"]["attention_head_dim"]) == (0.5, 4)
    found = layout(tmp_path, text=yaml_of(unet=["num_heads: 4", "num_head_channels: 64"]))
    assert "attention_head_dim" not in found.fields["unet"]
    for name, ours in (("linear", "scaled_linear"), ("cosine", "squaredcos_cap_v2")):
        found = layout(tmp_path, text=yaml_of(f"beta_schedule: {name}"))
        assert found.scheduler["beta_schedule"] == ours


def test_a_yaml_of_stabilitys_code(tmp_path):
    denoiser = {
        "params": {
            "scaling_config": {"target": "sgm.modules.diffusionmodules.denoiser_scaling.VScaling"},
            "discretization_config": {"params": {"linear_end": 0.013}},
        }
    }
    encoder = {"params": {"layer": "hidden", "layer_idx": 11}}
    text = yaml_of(
        "network_config: {params: {model_channels: 320, num_classes: sequential}}",
        denoiser_config=denoiser,
        conditioner_config={"params": {"emb_models": [encoder]}},
    )
    found = layout(tmp_path, text=text).scheduler
    assert (found["prediction_type"], found["beta_end"]) == ("v_prediction", 0.013)
    denoiser["params"]["scaling_config"]["target"] = "sgm.EDMScaling"
    with pytest.raises(InputError, match=r"model\.yaml: scaling_config: got EDMScaling, expected"):
        layout(tmp_path, text=yaml_of(denoiser_config=denoiser))


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_yaml_with_a_mark_of_its_encoding(tmp_path, encoding):
    path = write(tmp_path, few())
    path.with_suffix(".yaml").write_bytes(V.encode(encoding))
    assert read_layout(path, read_table(path)).scheduler["prediction_type"] == "v_prediction"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (yaml_of("sort: 3"), "got the unknown keys sort, which have no effect"),
        (yaml_of(unet=["model_channels: 128"]), r"model_channels: got 320 \(tensors\) and 128"),
        (yaml_of(unet=["context_dim: 1024"]), r"context_dim: got 768 \(tensors\) and 1024"),
        (yaml_of(cond_stage_config={"params": {"layer": "hidden", "layer_idx": -2}}), "clip_skip"),
    ],
)
def test_what_has_no_effect_is_said(tmp_path, text, message):
    with pytest.warns(UserWarning, match=message):
        layout(tmp_path, text=text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: {params: {a: !!python/object/apply:os.system ['true']}}", "got broken YAML"),
        ("model: [", "got broken YAML"),
        ("[" * 100_000, "got broken YAML"),
        ("x" * 2_000_000, "got more than 1000000 bytes"),
        ("other: 3", "got no model.params"),
        ("- 1", r"the file: got \[1\], expected keys"),
        ("model: 3", "model: got 3, expected keys"),
        (yaml_of("parameterization: flow"), "parameterization: got 'flow', expected eps, v, x0"),
        (yaml_of("beta_schedule: sqrt"), "beta_schedule: got 'sqrt', expected linear"),
        (yaml_of("linear_start: -1"), "linear_start: got -1, expected a positive number"),
        (yaml_of("timesteps: 2.5"), "timesteps: got 2.5, expected a positive integer"),
        (yaml_of("conditioning_key: crossattn-adm"), "conditioning_key: got 'crossattn-adm', exp"),
        (yaml_of(unet=["use_scale_shift_norm: True"]), "use_scale_shift_norm: got True, expected"),
        (yaml_of(unet=["num_head_channels: 32"]), "num_head_channels: got 32, expected 64"),
    ],
)
def test_a_yaml_that_is_broken_or_asks_for_more(tmp_path, text, message):
    with pytest.raises(InputError, match=rf"model\.yaml: {message}"):
        layout(tmp_path, text=text)


def test_a_note_that_nobody_knows(tmp_path):
    with pytest.raises(InputError, match="prediction_type: got 'rf', expected"):
        read_model(write(tmp_path, few(), "rf"))


def test_tables_of_the_schedule(tmp_path):
    usual = VPSchedule(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    zero = dataclasses.replace(usual, zero_terminal_snr=True)
    for schedule in (usual, zero):
        table = schedule.alphas_cumprod.astype(np.float16)
        found = layout(tmp_path, few() | {"alphas_cumprod": table})
        assert found.scheduler.get("rescale_betas_zero_snr", False) == (schedule == zero)
    for factor, wanted in ((np.float16(0.18215), 0.18215), (np.float32(0.25), 0.25)):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            found = layout(
                tmp_path,
                few() | {"scale_factor": np.asarray(factor)},
                text=yaml_of("scale_factor: .18215"),
            )
        assert found.scaling_factor == wanted
        assert len(said) == (wanted == 0.25)


def test_markers_are_written_where_the_family_is_another(tmp_path):
    parts = read_model(
        originals.write_safetensors(
            tmp_path / "x.safetensors",
            originals.original_tensors("sd1", originals.components("sd1")) | MARKERS,
        )
    )
    write_single_file(tmp_path / "again.safetensors", parts)
    assert read_table(tmp_path / "again.safetensors").keys() >= MARKERS.keys()
    assert read_model(tmp_path / "again.safetensors").scheduler == parts.scheduler
    other = dataclasses.replace(parts, scheduler={**parts.scheduler, "beta_end": 0.02})
    with pytest.warns(UserWarning, match=r"beta_end: got 0\.02, expected 0\.012: a single file"):
        write_single_file(tmp_path / "other.safetensors", other)
