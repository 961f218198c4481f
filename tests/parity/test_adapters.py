"""Formats of adapters, layer by layer: what LyCORIS computes with its modules, and PEFT merges."""

import logging

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import save_file

from jaxdiff.checkpoints.key_mapping import to_jax, torch_key_to_path
from jaxdiff.checkpoints.lora import read_lora

logging.disable(logging.WARNING)  # LyCORIS tells what it factorises
lycoris = pytest.importorskip("lycoris.modules")

pytestmark = pytest.mark.filterwarnings("ignore")
CLASSES = {module.name: module for module in lycoris.MODULE_LIST if hasattr(module, "name")}


class Layers(torch.nn.Module):
    """What networks are made of, each for itself."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(8, 12)
        self.square = torch.nn.Linear(12, 12, bias=False)
        self.wide = torch.nn.Linear(8, 16)
        self.conv = torch.nn.Conv2d(8, 12, 3, padding=1)
        self.norm = torch.nn.LayerNorm(12)
        torch.nn.init.normal_(self.norm.bias)


def layers(seed=0):
    torch.manual_seed(seed)
    return Layers()


def inputs(layer):
    torch.manual_seed(5)
    if isinstance(layer, torch.nn.Conv2d):
        return torch.randn(2, layer.in_channels, 5, 5)
    return torch.randn(2, layer.weight.shape[-1])


def randomise(parameters):
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in parameters:
            parameter.copy_(
                0.3 * torch.randn(parameter.shape) + (parameter if parameter.any() else 0)
            )


def changed(source, model, scale=1.0):
    """Apply a file to a copy of `model`'s parameters; returns what has changed."""
    before = {key: tensor.numpy() for key, tensor in model.state_dict().items()}
    paths = {key: torch_key_to_path(key, array.ndim) for key, array in before.items()}
    shapes = {path: to_jax(before[key], path).shape for key, path in paths.items()}
    changes = read_lora(source, {"unet": shapes})["unet"]
    after = {
        key: before[key] + scale * change.delta(before[key]) for key, change in changes.items()
    }
    for array in after.values():
        assert array.dtype == np.float32
    return {key: torch.tensor(array) for key, array in after.items()}


def near(got, want):
    return float((got - want).abs().max() / want.abs().max())


FACTORS = [
    (name, options)
    for name in ("locon", "loha", "kron")
    for options in (
        {},
        {"use_tucker": True},
        {"weight_decompose": True},
        {"weight_decompose": True, "wd_on_out": False},
    )
]
LYCORIS = [
    *((name, {"lora_dim": 2, "alpha": 3.0, **options}) for name, options in FACTORS),
    ("locon", {"lora_dim": 2, "alpha": 3.0, "rs_lora": True}),
    ("loha", {"lora_dim": 2, "alpha": 3.0, "rs_lora": True}),
    ("loha", {"lora_dim": 2, "alpha": 0}),
    ("kron", {"lora_dim": 1, "alpha": 3.0, "decompose_both": True, "factor": 4}),
    ("kron", {"lora_dim": 1, "alpha": 3.0, "unbalanced_factorization": True}),
    ("kron", {"lora_dim": 1, "alpha": 3.0, "rs_lora": True}),
    ("kron", {"lora_dim": 100, "alpha": 3.0}),
    ("glora", {"lora_dim": 2, "alpha": 3.0}),
    ("ia3", {"train_on_input": True}),
    ("ia3", {}),
    ("diag-oft", {"lora_dim": 4}),
    ("diag-oft", {"lora_dim": 4, "constraint": 0.01}),
    ("diag-oft", {"lora_dim": 4, "rescaled": True}),
    ("boft", {"lora_dim": 6}),
    ("boft", {"lora_dim": 6, "constraint": 0.01, "rescaled": True}),
    ("full", {}),
]


@pytest.mark.parametrize("place", ["linear", "square", "conv"])
@pytest.mark.parametrize(("name", "options"), LYCORIS)
def test_lycoris(tmp_path, name, options, place):
    """Its forward pass, which its own merge disagrees with for LoHa and LoKr."""
    check_lycoris(tmp_path, name, options, place)


@pytest.mark.parametrize(
    ("name", "options", "place"),
    [("norm", {}, "norm"), ("boft", {"lora_dim": 2}, "wide"), ("boft", {"lora_dim": 8}, "wide")],
)
def test_lycoris_of_other_layers(tmp_path, name, options, place):
    check_lycoris(tmp_path, name, options, place)


@pytest.mark.parametrize("name", ["locon", "loha", "kron", "glora", "ia3", "diag-oft"])
def test_lycoris_with_a_scale(tmp_path, name):
    options = {} if name == "ia3" else {"lora_dim": 4}
    check_lycoris(tmp_path, name, options, "linear", scale=0.7)


def check_lycoris(folder, name, options, place, scale=1.0):
    model = layers()
    layer = getattr(model, place)
    x, whole = inputs(layer), {key: t.clone() for key, t in model.state_dict().items()}
    own = [id(parameter) for parameter in layer.parameters()]
    module = CLASSES[name](f"lora_unet_{place}", layer, multiplier=scale, **options)
    randomise(p for p in module.parameters() if id(p) not in own)
    before = layer(x).detach()
    module.apply_to()
    module.eval()
    want = layer(x).detach()
    stored = module.custom_state_dict() or module.state_dict()
    tensors = {
        f"{module.lora_name}.{key}": torch.as_tensor(t).detach().float().contiguous()
        for key, t in stored.items()
        if not key.startswith("org_module")
    }
    save_file(tensors, folder / "x.safetensors")
    model = layers()
    after = changed(folder / "x.safetensors", model, scale)
    assert {key.partition(".")[0] for key in after} == {place}
    model.load_state_dict(whole | after)
    got = getattr(model, place)(x)
    assert near(got, want) < 2e-6
    assert near(before, want) > 1e-2


BOTH = {"target_modules": ["linear", "square", "conv"]}
PEFT = {
    "LoRA": peft.LoraConfig(r=3, lora_alpha=6, **BOTH),
    "patterns": peft.LoraConfig(
        r=3,
        lora_alpha=6,
        rank_pattern={"^con.": 2, "linear|x": 5},
        alpha_pattern={"(square|linear)": 4, "linear": 9},
        use_rslora=True,
        **BOTH,
    ),
    "biases": peft.LoraConfig(r=3, lora_alpha=6, lora_bias=True, target_modules=["linear", "conv"]),
    "DoRA": peft.LoraConfig(r=3, lora_alpha=6, use_dora=True, **BOTH),
    "LoHa": peft.LoHaConfig(r=3, alpha=6, **BOTH),
    "LoHa of Tucker": peft.LoHaConfig(r=3, alpha=6, use_effective_conv2d=True, **BOTH),
    "LoKr": peft.LoKrConfig(r=1, alpha=6, alpha_pattern={".*ar": 3}, **BOTH),
    "LoKr of pairs": peft.LoKrConfig(r=1, alpha=6, decompose_both=True, decompose_factor=4, **BOTH),
    "LoKr of Tucker": peft.LoKrConfig(r=1, alpha=6, use_effective_conv2d=True, **BOTH),
    "LoKr of whole factors": peft.LoKrConfig(r=20, alpha=6, rank_pattern={"conv": 30}, **BOTH),
    "(IA)^3": peft.IA3Config(feedforward_modules=[], **BOTH),
    "(IA)^3 of inputs": peft.IA3Config(feedforward_modules=["linear", "conv"], **BOTH),
    "OFT": peft.OFTConfig(oft_block_size=4, use_cayley_neumann=False, **BOTH),
    "OFT by a series": peft.OFTConfig(oft_block_size=4, **BOTH),
    "OFT by a short series": peft.OFTConfig(oft_block_size=4, num_cayley_neumann_terms=3, **BOTH),
    "OFT of one block": peft.OFTConfig(oft_block_size=4, block_share=True, **BOTH),
}


@pytest.mark.parametrize("name", PEFT)
def test_peft(tmp_path, name):
    adapted = peft.get_peft_model(layers(), PEFT[name])
    own = ("lora_", "hada_", "lokr_", "ia3_", "oft_")
    randomise(p for key, p in adapted.named_parameters() if any(part in key for part in own))
    adapted.save_pretrained(tmp_path)
    want = adapted.merge_and_unload().state_dict()
    model = layers()
    after = changed(tmp_path, model)
    places = {"linear", "square", "conv"} & set(PEFT[name].target_modules)
    assert {key.partition(".")[0] for key in after} == places
    for key, before in model.state_dict().items():
        assert near(after.get(key, before), want[key]) < 2e-6
        assert (near(before, want[key]) > 1e-3) == (key in after)
