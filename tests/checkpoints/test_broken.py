"""Damaged checkpoints of every kind through the commands: a sentence and exit code 2, or success.

Anything else, a traceback above all, fails the test.
"""

import json
import pathlib
import shutil

import numpy as np
import originals
import pytest
import tiny
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxdiff.checkpoints.lora import read_lora
from jaxdiff.checkpoints.textual_inversion import read_bundled, read_inversion
from jaxdiff.cli import main
from jaxdiff.core.errors import InputError

PAGE = b"<!DOCTYPE html><html><body>404</body></html>"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
SLOW = settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A small pipeline folder."""
    return tiny.write_tiny(tmp_path_factory.mktemp("whole") / "model")


@pytest.fixture(scope="module")
def files(whole):
    return sorted(str(p.relative_to(whole)) for p in whole.rglob("*") if p.is_file())


def header_of(data: bytes) -> tuple[dict, bytes]:
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def with_header(table: dict, rest: bytes) -> bytes:
    text = json.dumps(table).encode()
    return len(text).to_bytes(8, "little") + text + rest


def changed_header(data: bytes, draw) -> bytes:
    """One tensor renamed, retyped, reshaped or gone, in an otherwise sound file."""
    table, rest = header_of(data)
    name = draw(st.sampled_from(sorted(n for n in table if n != "__metadata__")))
    how = draw(st.sampled_from(["rename", "dtype", "shape", "offsets", "drop"]))
    if how in ("rename", "drop"):
        row = table.pop(name)
        table |= {f"{name}.other": row} if how == "rename" else {}
    elif how == "dtype":
        table[name]["dtype"] = draw(st.sampled_from(["I64", "F64", "F16", "F8_E5M2", "", None]))
    elif how == "shape":
        table[name]["shape"] = draw(st.lists(st.integers(-1, 2**40), max_size=5))
    else:
        table[name]["data_offsets"] = draw(st.lists(st.integers(-1, 2**63), max_size=3))
    return with_header(table, rest)


def damage(data: bytes, draw, *, tensors: bool) -> bytes:
    """`data` hurt in one of the ways in which files are."""
    ways = [
        "cut",
        "flip",
        "page",
        "pointer",
        "empty",
        "noise",
        *(["header"] * 3 if tensors else []),
    ]
    how = draw(st.sampled_from(ways))
    if how == "cut":
        return data[: draw(st.integers(0, max(len(data) - 1, 0)))]
    if how == "flip":
        spoilt = bytearray(data)
        for place in draw(st.lists(st.integers(0, min(len(data), 4096) - 1), min_size=1)):
            spoilt[place] ^= 1 << draw(st.integers(0, 7))
        return bytes(spoilt)
    if how == "noise":
        return draw(st.binary(max_size=64))
    if how == "header":
        return changed_header(data, draw)
    return {"page": PAGE, "pointer": POINTER, "empty": b""}[how]


@SLOW
@given(data=st.data())
def test_folders(whole, files, tmp_path_factory, capsys, data):
    folder = tmp_path_factory.mktemp("broken") / "model"
    shutil.copytree(whole, folder)
    for name in data.draw(st.lists(st.sampled_from(files), min_size=1, max_size=2, unique=True)):
        path = folder / name
        if data.draw(st.integers(0, 9)) == 0:
            path.unlink()
        else:
            tensors = path.suffix == ".safetensors"
            path.write_bytes(damage(path.read_bytes(), data.draw, tensors=tensors))
    for command in (["inspect", str(folder)], ["convert", str(folder), str(folder.parent / "new")]):
        code = main.run(command[0], command[1:])
        said = capsys.readouterr().err
        assert code in (0, 2)
        assert (code == 2) == bool(said), said
        assert said.count("\n") <= 1 or "warning" in said
    shutil.rmtree(folder.parent)


RELATIVES = {  # of LoRA, for layers of 3 rows and 4 columns
    "lora_unet_a.hada_w1_a": (3, 2),
    "lora_unet_a.hada_w1_b": (2, 4),
    "lora_unet_a.hada_w2_a": (3, 2),
    "lora_unet_a.hada_w2_b": (2, 4),
    "lora_unet_b.lokr_w1": (3, 2),
    "lora_unet_b.lokr_w2_a": (1, 1),
    "lora_unet_b.lokr_w2_b": (1, 2),
    "lora_unet_b.alpha": (),
    "lora_unet_c.oft_blocks": (1, 3, 3),
    "lora_unet_c.alpha": (),
    "lora_unet_d.weight": (3,),
    "lora_unet_e.a1.weight": (4, 1),
    "lora_unet_e.a2.weight": (1, 4),
    "lora_unet_e.b1.weight": (3, 1),
    "lora_unet_e.b2.weight": (1, 4),
    "lora_unet_f.diff": (3, 4),
    "lora_unet_f.dora_scale": (3, 1),
    "lora_unet_f.diff_b": (3,),
    "unet.g.ia3_l": (1, 4),
    "bundle_emb.x.emb_params": (2, 4),
}


@pytest.fixture(scope="module")
def small():
    """A LoRA and an inversion as files in memory."""
    rng = np.random.default_rng(0)

    def tensors(shapes):
        return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}

    return {
        "lora": tensors(
            {
                "lora_unet_conv_in.lora_down.weight": (2, 4),
                "lora_unet_conv_in.lora_up.weight": (3, 2),
                "lora_unet_conv_in.alpha": (),
                "lora_unet_conv_out.lora_down.weight": (2, 4, 3, 3),
                "lora_unet_conv_out.lora_up.weight": (3, 2, 1, 1),
            }
        ),
        "relatives": tensors(RELATIVES),
        "word": tensors({"<x>": (2, 4)}),
    }


@settings(SLOW, max_examples=300)
@given(data=st.data(), kind=st.sampled_from(["lora", "relatives", "word"]))
def test_loras_and_words(small, tmp_path, capsys, kind, data):
    path: pathlib.Path = originals.write_safetensors(tmp_path / "x.safetensors", small[kind])
    path.write_bytes(damage(path.read_bytes(), data.draw, tensors=True))
    try:
        if kind == "lora":
            read_lora(path, {"unet": {"conv_in.kernel": (4, 3), "conv_out.kernel": (3, 3, 4, 3)}})
        elif kind == "relatives":
            table = {f"{layer}.kernel": (4, 3) for layer in "abcdefg"} | {"f.bias": (3,)}
            for key, change in read_lora(path, {"unet": table})["unet"].items():
                weight = np.ones((3, 4) if key.endswith(".weight") else (3,), np.float32)
                with np.errstate(all="ignore"):
                    assert change.delta(weight).shape == weight.shape
            read_bundled(path, {"text_encoder": 4})
        else:
            read_inversion(path, {"text_encoder": 4})
    except InputError as error:
        assert "\n" not in str(error)  # noqa: PT017
    for command in (
        ["inspect", str(path)],
        ["convert", str(path), str(tmp_path / "new.safetensors")],
    ):
        code = main.run(command[0], command[1:])
        assert (code, capsys.readouterr().err.count("\n")) in ((0, 0), (2, 1))


def test_a_shard_outside_of_the_folder(whole, tmp_path, capsys):
    folder = tmp_path / "model"
    shutil.copytree(whole, folder)
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    (tmp_path / "secret.safetensors").write_bytes(weights.read_bytes())
    names = [name for name in header_of(weights.read_bytes())[0] if name != "__metadata__"]
    weights.unlink()
    index = {"weight_map": dict.fromkeys(names, "../../secret.safetensors")}
    weights.with_name(f"{weights.name}.index.json").write_text(json.dumps(index))
    assert main.run("convert", [str(folder), str(tmp_path / "new")]) == 2
    assert "secret.safetensors" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
