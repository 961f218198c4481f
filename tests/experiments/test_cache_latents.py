"""cache-latents: writes what the VAE says, goes on after a kill, and training reads it."""

import json
import shutil
import tarfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from captioned_images import caption, write_folder

from jaxdiff.checkpoints.components import read_component, write_component
from jaxdiff.cli import main
from jaxdiff.cli.cache_latents import run as cache
from jaxdiff.cli.train import run as train
from jaxdiff.core.errors import InputError
from jaxdiff.data.batches import normalize_images
from jaxdiff.data.latents import LatentSource
from jaxdiff.data.preprocessing import resize_and_crop
from jaxdiff.experiments import cache_latents
from jaxdiff.experiments.loggers import read_lines
from jaxdiff.models.autoencoder_tiny import AutoencoderTiny
from jaxdiff.parallel.mesh import data_mesh
from jaxdiff.scenes.source import SceneSource

UNET = """
from jaxdiff.models.unet.config import UNet2DConditionConfig
from jaxdiff.training.config import DataConfig, DiffusionObjective, TrainConfig
model = UNet2DConditionConfig(
    sample_size=8, block_out_channels=(4,), layers_per_block=1,
    down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",),
    norm_num_groups=2, cross_attention_dim=8, attention_head_dim=1,
)
objective = DiffusionObjective(
    model=model, vae="FOLDER/model/vae", text_encoder="FOLDER/model", sample_steps=2)
config = TrainConfig(objective=objective, steps=2, batch_size=8, sample_every=2, log_every=1,
    data=DataConfig(kind="latents", path="FOLDER/latents", validation_size=4))
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a tiny model, pictures and their latents."""
    folder = tmp_path_factory.mktemp("cached")
    tiny.write_tiny(folder / "model")
    write_folder(folder / "in", 44, table=True, sizes=((16, 16), (20, 20), (16, 32)))
    (folder / "in" / "0004.png").write_bytes(b"nothing")
    assert main.run("cache-latents", command(folder)) == 0
    return folder


def command(folder, output="latents", *more, data="in"):
    """Arguments: shards of ten pictures, two sizes."""
    return [
        *(str(folder / "model"), str(folder / output), "--kind", "folder"),
        *("--path", str(folder / data), "--resolution", "16", "--bucket-multiple", "8"),
        *("--max-aspect-ratio", "4", "--cache-dir", str(folder / "cache")),
        *("--shard-size", "10", "--min-bucket-size", "8"),
        *("--dtype", "float32", *more),
    ]


def contents(folder):
    """All files of a folder."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_latents_are_what_the_vae_says_of_the_prepared_image(made):
    vae = read_component(made / "model" / "vae").module
    source = LatentSource(str(made / "latents"))
    assert len(source) == 43
    seen = set()
    encode = jax.jit(vae.encode)
    for i in range(43):
        item = source[i]
        number = int(item["caption"].split()[-1])
        seen.add(number)
        assert item["caption"] == caption(number)
        data = (made / "in" / f"{number:04d}.png").read_bytes()
        prepared = resize_and_crop(data, tuple(item["time_ids"][4:].tolist()))
        assert item["time_ids"].tolist() == prepared.time_ids.tolist()
        mean, logvar = encode(jnp.asarray(normalize_images(prepared.image)[None]))
        np.testing.assert_allclose(item["mean"], mean[0], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(item["logvar"], logvar[0], rtol=1e-4, atol=1e-5)
    assert seen == set(range(44)) - {4}
    sizes = {tuple(source[i]["time_ids"][4:].tolist()) for i in range(43)}
    assert sizes == {(16, 16), (8, 24)}
    groups = dict(source.groups(4))
    assert {size: len(items) for size, items in groups.items()} == {(8, 24): 14, (16, 16): 29}
    with pytest.warns(UserWarning, match="14 latents of 8x24 pixels are not used"):
        assert len(source.groups(20)) == 1
    with pytest.warns(UserWarning, match="14 latents of 8x24 pixels are not used"):
        assert [len(items) for _, items in source.groups(100)] == [29]


def test_parts_of_the_work_are_the_whole_and_what_is_there_stays(made, capsys):
    for index in (1, 0):
        part = ["--process-index", str(index), "--process-count", "2"]
        cache(command(made, "parts", *part))
    whole, parts = contents(made / "latents"), contents(made / "parts")
    assert whole == parts
    assert len(whole) == 6
    assert "5 of 5 shards" in capsys.readouterr().out


def test_a_killed_run_is_finished_by_the_same_command(made, tmp_path, monkeypatch):
    real, calls = cache_latents.pack_record, []

    def dying(*arguments):
        calls.append(1)
        if len(calls) > 25:
            raise KeyboardInterrupt
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(cache_latents, "pack_record", dying)
        assert main.run("cache-latents", command(made, "killed")) == 130
    before = contents(made / "killed")
    assert len(before) == 3  # latents.json and the two whole shards
    with pytest.raises(InputError, match="got 2 of 5 shards"):
        LatentSource(str(made / "killed"))
    (made / "killed" / ".latents-00002-of-00005.array_record.1.part").write_bytes(b"half")
    times = {p.name: p.stat().st_mtime_ns for p in (made / "killed").iterdir()}
    cache(command(made, "killed"))
    assert contents(made / "killed") == contents(made / "latents")
    for name in before:
        assert (made / "killed" / name).stat().st_mtime_ns == times[name]


def test_latents_of_something_else_are_not_mixed_in(made, capsys):
    others = {
        "dtype": ["--dtype", "bfloat16"],
        "source": ["--flip"],
        "heights": ["--shard-size", "9"],
    }
    for name, more in others.items():
        assert main.run("cache-latents", [*command(made), *more]) == 2
        assert f"with latents of {name} " in capsys.readouterr().err
    assert main.run("cache-latents", [*command(made), "--process-index", "0"]) == 2
    assert main.run("cache-latents", command(made, "x", data="latents")) == 2
    assert "got folder for" in capsys.readouterr().err
    assert main.run("cache-latents", [str(made / "model"), str(made / "x")]) == 2
    assert "num_scenes: got none" in capsys.readouterr().err
    assert not (made / "x").exists()


@pytest.mark.parametrize("texts", ["captions", "embeddings"])
def test_without_a_usable_image_nothing_is_written(made, capsys, texts):
    write_folder(made / "empty", 3)
    cases = {
        "3 broken image": lambda path: path.with_suffix(".png").write_bytes(b"none"),
        "3 empty caption": lambda path: path.write_text(" "),
        "3 without caption": lambda path: path.unlink(),
    }
    for reason, spoil in cases.items():
        for path in sorted((made / "empty").glob("*.txt")):
            spoil(path)
        assert main.run("cache-latents", command(made, "y", "--texts", texts, data="empty")) == 2
        wanted = f"data.path: got {made}/empty without usable items ({reason}), expected images"
        assert wanted in capsys.readouterr().err
        write_folder(made / "empty", 3)
    with tarfile.open(made / "empty.tar", "w"):
        pass
    tars = [*command(made, "y", data="tars"), "--kind", "tars"]
    (made / "tars").mkdir(exist_ok=True)
    shutil.copy(made / "empty.tar", made / "tars" / "0.tar")
    assert main.run("cache-latents", tars) == 2
    assert f"got {made}/tars without usable items, expected images" in capsys.readouterr().err
    assert not (made / "y").exists()


@pytest.mark.parametrize(("dtype", "bits"), [("float16", 11), ("bfloat16", 8)])
def test_smaller_dtypes_round_and_no_more(made, dtype, bits):
    cache(command(made, dtype, "--dtype", dtype))
    small, exact = (LatentSource(str(made / name)) for name in (dtype, "latents"))
    for i in range(0, len(exact), 7):
        for name in ("mean", "logvar"):
            rounded, value = small[i][name], exact[i][name]
            assert rounded.dtype == np.float32
            np.testing.assert_allclose(rounded, value, rtol=2.0**-bits, atol=1e-6)
            assert not np.array_equal(rounded, value)


@pytest.mark.slow
@pytest.mark.usefixtures("standard_promotion")
def test_training_from_latents_never_encodes(made, tmp_path, monkeypatch):
    path = tmp_path / "unet.py"
    path.write_text(UNET.replace("FOLDER", str(made)))
    with monkeypatch.context() as patch:
        patch.setattr(
            "jaxdiff.models.vae.AutoencoderKL.encode", lambda *_: pytest.fail("encoded again")
        )
        train([str(path), "--workdir", str(tmp_path / "w")])
    log = read_lines(tmp_path / "w" / "log.jsonl")
    assert [line["step"] for line in log] == [1, 2]
    assert np.isfinite(log[1]["validation_loss"])
    assert (tmp_path / "w" / "samples" / "step_000002.png").exists()
    shutil.copytree(made / "latents", tmp_path / "latents")
    described = json.loads((tmp_path / "latents" / "latents.json").read_text())
    described["vae"] = "0" * 16
    (tmp_path / "latents" / "latents.json").write_text(json.dumps(described))
    with pytest.raises(InputError, match="by a VAE with the digest 0000000000000000, expected"):
        train(
            [str(path), "--workdir", str(tmp_path / "v"), "--data.path", str(tmp_path / "latents")]
        )
    assert not (tmp_path / "v").exists()


def test_broken_folders_of_latents_are_named(made, tmp_path):
    with pytest.raises(InputError, match=r"expected a folder with the latents\.json"):
        LatentSource(str(tmp_path))
    shutil.copytree(made / "latents", tmp_path / "l")
    first = tmp_path / "l" / "latents-00000-of-00005.array_record"
    first.write_bytes(first.read_bytes()[:70000])
    with pytest.raises(InputError, match=r"00000-of-00005\.array_record: got a broken file"):
        LatentSource(str(tmp_path / "l"))


def test_scenes_are_cached_as_the_source_draws_them(made, tmp_path, capsys):
    folder = tmp_path / "latents"
    arguments = [str(made / "model"), str(folder), "--kind", "scenes", "--seed", "5"]
    wanted = [*arguments, "--num-scenes", "6", "--shard-size", "4", "--dtype", "float32"]
    assert main.run("cache-latents", wanted) == 0
    found, drawn = LatentSource(str(folder)), SceneSource(seed=5)
    vae = read_component(made / "model" / "vae").module
    assert [found[i]["caption"] for i in range(6)] == [drawn[i]["caption"] for i in range(6)]
    mean, _ = vae.encode(jnp.asarray(normalize_images(drawn[5]["image"])[None]))
    np.testing.assert_allclose(found[5]["mean"], mean[0], atol=2e-5)
    assert found.description.resolution == 64
    capsys.readouterr()
    other = [str(made / "model"), str(tmp_path / "other"), "--kind", "scenes"]
    for more, message in (
        ([], "num_scenes: got none"),
        (["--num-scenes", "0"], "num_scenes: got 0"),
        (["--num-scenes", "3", "--resolution", "16"], "data.resolution: got 16"),
        (
            ["--num-scenes", "3", "--resolution", "65"],
            "data.resolution: got 65, expected a multiple",
        ),
    ):
        assert main.run("cache-latents", [*other, *more]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_a_vae_without_variance(made, tmp_path):
    """TAESD gives one latent for an image."""
    part = tiny.random_component(AutoencoderTiny, tiny.TAESD)
    write_component(tmp_path / "taesd", part)
    encode = cache_latents._encoder(part.module, 8, data_mesh(jax.local_devices()))
    images = np.random.default_rng(0).normal(size=(3, 8, 8, 3)).astype(np.float32)
    mean, logvar = encode(images)
    np.testing.assert_allclose(mean, part.module.encode(jnp.asarray(images))[0], atol=1e-5)
    np.testing.assert_array_equal(logvar, np.full_like(mean, -30))
    arguments = command(made, str(tmp_path / "latents"))
    assert main.run("cache-latents", [str(tmp_path / "taesd"), *arguments[1:]]) == 0


def test_files_are_no_folders(tmp_path, capsys):
    (tmp_path / "vae.safetensors").touch()
    given = [str(tmp_path / "vae.safetensors"), str(tmp_path / "out"), "--kind", "scenes"]
    assert main.run("cache-latents", given) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("cache-latents: vae: got the file ")
    assert said.endswith("vae.safetensors, expected a folder, as jaxdiff convert makes of it")
