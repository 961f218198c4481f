"""Training on stored pictures: configs, batches, the log, what is refused."""

import dataclasses

import numpy as np
import pytest
from captioned_images import (
    caption,
    encoded,
    pixels,
    write_array_record,
    write_folder,
    write_parquet,
    write_tar,
)
from PIL import Image

from jaxdiff.cli import main
from jaxdiff.cli.train import run
from jaxdiff.core.errors import InputError
from jaxdiff.data.batches import batches, normalize_images
from jaxdiff.data.tokenizer import load_tokenizer, tokenize
from jaxdiff.data.trained_tokenizer import train_tokenizer
from jaxdiff.experiments import experiment, vae
from jaxdiff.experiments.datasets import open_dataset
from jaxdiff.experiments.experiment import training_batches, validation_batch, validation_captions
from jaxdiff.experiments.loggers import read_lines
from jaxdiff.scenes.source import SceneSource
from jaxdiff.training.config import (
    ClassifierObjective,
    DataConfig,
    DiffusionObjective,
    TrainConfig,
    VAEObjective,
)

TOKENIZER = train_tokenizer([caption(i) for i in range(40)], 560, 12)
OBJECTIVE = DiffusionObjective(vae="", text_encoder="")
VAE = """
from jaxdiff.models.vae import AutoencoderKLConfig
from jaxdiff.training.config import DataConfig, TrainConfig, VAEObjective
model = AutoencoderKLConfig(
    down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    block_out_channels=(2, 2), norm_num_groups=2, latent_channels=2, sample_size=16,
    mid_block_add_attention=False,
)
config = TrainConfig(objective=VAEObjective(model=model), steps=3, batch_size=8, log_every=1,
    checkpoint_every=1, sample_every=3, data=DataConfig(
        kind="folder", path="FOLDER/in", resolution=16, bucket_multiple=8,
        max_aspect_ratio=2, validation_size=4,
        crop="random", flip=True, cache_dir="FOLDER/cache", max_bad_fraction=0.5))
"""


CLIP = """
from jaxdiff.models.clip_config import CLIPTextConfig, CLIPVisionConfig
from jaxdiff.training.config import CLIPObjective, DataConfig, TrainConfig
sizes = dict(hidden_size=4, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
text = CLIPTextConfig(vocab_size=560, max_position_embeddings=12, **sizes)
vision = CLIPVisionConfig(image_size=16, patch_size=8, **sizes)
config = TrainConfig(objective=CLIPObjective(text=text, vision=vision, projection_dim=4),
    steps=1, batch_size=8, data=DataConfig(
        kind="folder", path="FOLDER/in", resolution=16, bucket_multiple=8))
"""


def config_of(folder, kind, **fields):
    """A training on the pictures in a folder, 12 by 12."""
    data = DataConfig(
        kind=kind,
        path=str(folder),
        resolution=12,
        bucket_multiple=4,
        validation_size=2,
        cache_dir=f"{folder}-cache",
    )
    data = dataclasses.replace(data, **fields)
    return TrainConfig(objective=OBJECTIVE, steps=1, batch_size=4, data=data)


def write(folder, kind):
    """24 pictures of 12 by 12, PNGs all."""
    if kind == "tars":
        for start in (0, 12):
            write_tar(folder / f"{start}.tar", range(start, start + 12), "png")
    elif kind == "records":
        write_array_record(folder / "a.array_record", range(24))
    elif kind == "parquet":
        for start in (0, 12):
            write_parquet(folder / f"train-{start}.parquet", range(start, start + 12), rows=5)
    else:
        write_folder(folder, 24, table=True)
    return folder


@pytest.mark.parametrize("kind", ["folder", "tars", "records", "parquet", "hub"])
def test_every_kind_gives_each_image_with_its_caption_once(tmp_path, kind, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    config = config_of(write(tmp_path / "in", kind), kind)
    stream = training_batches(config, TOKENIZER)
    ids = {tuple(row): i for i, row in enumerate(tokenize(TOKENIZER, map_captions(24)).tolist())}
    seen = []
    for _ in range(5):  # 24 items without the two held out: five batches of four
        batch = next(stream)
        assert batch["time_ids"].tolist() == [[12, 10, 1, 0, 12, 12]] * 4
        for image, row in zip(batch["image"], batch["ids"].tolist(), strict=True):
            number = ids[tuple(row)]
            assert np.abs(image[:, 6, 0] - whole(number)[:, 5, 0]).max() < 0.1
            seen.append(number)
    stream.close()
    assert len(set(seen)) == 20
    assert not set(seen) & {0, 12}
    held = validation_batch(config, TOKENIZER)
    assert {ids[tuple(row)] for row in held["ids"].tolist()} == {0, 12}
    assert sorted(set(validation_captions(config, 5))) == [caption(0), caption(12)]


def map_captions(count):
    return [caption(i) for i in range(count)]


def whole(number):
    """The picture as it is brought to 12 by 12: enlarged, then cut above and below."""
    large = Image.fromarray(pixels(number)).resize((12, 14), Image.Resampling.LANCZOS)
    return normalize_images(np.asarray(large)[1:13])


def test_scenes_are_batched_as_ever():
    config = TrainConfig(objective=VAEObjective(), steps=1, batch_size=4, data=DataConfig(seed=3))
    stream = training_batches(config, TOKENIZER)
    plain = batches(SceneSource(seed=3), batch_size=4, tokenizer=TOKENIZER)
    for _ in range(2):
        ours, theirs = next(stream), next(plain)
        assert ours.keys() == theirs.keys() == {"image", "ids"}
        assert all(ours[name].tobytes() == theirs[name].tobytes() for name in ours)
    assert stream.get_state() == plain.get_state()
    assert stream.counts() == {}
    assert stream.identity == {}
    stream.close()
    plain.close()


def test_other_files_are_another_identity(tmp_path):
    config = config_of(write(tmp_path / "in", "folder"), "folder")
    before = training_batches(config, TOKENIZER).identity
    assert before == training_batches(config, TOKENIZER).identity
    bucketed = dataclasses.replace(
        config, data=dataclasses.replace(config.data, max_aspect_ratio=2)
    )
    assert training_batches(bucketed, TOKENIZER).identity != before
    (tmp_path / "in" / "0003.png").write_bytes(encoded(9, (40, 12)))
    assert training_batches(config, TOKENIZER).identity != before


def test_processes_that_see_other_files_are_told(tmp_path, monkeypatch):
    config = config_of(write(tmp_path / "in", "folder"), "folder")
    monkeypatch.setattr(
        experiment.multihost_utils, "broadcast_one_to_all", lambda array: np.zeros_like(array)
    )
    with pytest.raises(InputError, match="expected 0000000000000000 as process 0 has found"):
        training_batches(config, TOKENIZER, process_count=2)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "folders"}, "did you mean 'folder'"),
        ({"kind": "folder"}, "data.path: got none"),
        ({"kind": "folder", "path": "x"}, "data.resolution: got 0"),
        (
            {"kind": "folder", "path": "x", "resolution": 100},
            "multiple of data.bucket_multiple, 64",
        ),
        (
            {"kind": "folder", "path": "x", "resolution": 64, "variations": 2},
            "expected 1 for data.kind folder",
        ),
        (
            {"kind": "tars", "path": "x", "resolution": 64, "split": "test"},
            "expected .train. for data.kind tars",
        ),
        ({"kind": "latents", "path": "x", "resolution": 64}, "expected None for data.kind latents"),
        ({"path": "x"}, "data.path: got 'x', expected None for data.kind scenes, which does not"),
        ({"crop": "middle"}, "data.crop"),
        ({"max_bad_fraction": 2.0}, "data.max_bad_fraction"),
        ({"max_aspect_ratio": 0.5}, "data.max_aspect_ratio"),
        ({"bucket_multiple": 0}, "data.bucket_multiple"),
        ({"validation_size": 0}, "data.validation_size"),
        ({"threads": -1}, "data.threads"),
    ],
)
def test_impossible_data_is_refused(fields, message):
    with pytest.raises(InputError, match=message):
        DataConfig(**fields)


def test_objectives_that_need_scenes_say_so(tmp_path):
    config = config_of(write(tmp_path / "in", "folder"), "folder")
    other = dataclasses.replace(config, objective=ClassifierObjective(vae=""))
    wanted = r"data\.kind: got folder for a ClassifierObjective, expected scenes"
    for call in (training_batches, validation_batch):
        with pytest.raises(InputError, match=wanted):
            call(other)


@pytest.mark.slow
@pytest.mark.usefixtures("standard_promotion")
def test_clip_learns_the_words_of_stored_captions(tmp_path):
    write_folder(tmp_path / "in", 30)
    (tmp_path / "0001.png").write_bytes(b"")
    (tmp_path / "tiny.py").write_text(CLIP.replace("FOLDER", str(tmp_path)))
    command = [str(tmp_path / "tiny.py"), "--workdir", str(tmp_path / "a")]
    run(command)
    tokenizer = load_tokenizer(tmp_path / "a" / "export" / "tokenizer")
    # start, one token for each word, end
    words = caption(3).split()
    assert len(tokenizer(caption(3))["input_ids"]) == len(words) + 2
    (line,) = read_lines(tmp_path / "a" / "log.jsonl")
    assert 0 <= line["validation_retrieval"] <= 1
    with pytest.raises(InputError, match=r"image_size: got 16 for images of 24"):
        run([*command[:2], str(tmp_path / "b"), "--data.resolution", "24"])


def test_few_images_are_validated_and_trained_on(tmp_path):
    write_folder(tmp_path / "in", 5)
    data = config_of(tmp_path / "in", "folder").data
    with pytest.warns(UserWarning, match="5 items are too few for a validation split, so"):
        stored = open_dataset(data, 4)
    assert stored.validation_size == 2
    trained = {stored.training[i]["caption"] for i in range(40)}
    assert trained == {caption(i) for i in range(5)}
    write_folder(tmp_path / "none", 2)
    for name in ("0000.txt", "0001.txt"):
        (tmp_path / "none" / name).unlink()
    with pytest.raises(InputError, match=r"without usable items \(2 without caption\), expected"):
        open_dataset(config_of(tmp_path / "none", "folder").data, 1)


@pytest.mark.parametrize(("form", "objective"), [("VAE", VAE), ("CLIP", CLIP)])
def test_a_training_without_a_readable_image_leaves_no_workdir(tmp_path, capsys, form, objective):
    write_folder(tmp_path / "in", 10)
    for path in (tmp_path / "in").glob("*.png"):
        path.write_bytes(b"none")
    (tmp_path / "tiny.py").write_text(objective.replace("FOLDER", str(tmp_path)))
    command = [str(tmp_path / "tiny.py"), "--workdir", str(tmp_path / form)]
    assert main.run("train", [*command, "--data.max-aspect-ratio", "1"]) == 2
    wanted = "/in: got 1 unreadable items in a row (1 broken image), expected a readable one"
    message = capsys.readouterr().err
    assert message.startswith("train: validation split of")
    assert wanted in message
    assert not (tmp_path / form).exists()


@pytest.mark.parametrize("kind", ["folder", "parquet"])
def test_a_batch_may_be_larger_than_the_data(tmp_path, kind):
    config = config_of(write(tmp_path / "in", kind), kind)
    with pytest.warns(UserWarning, match="22 training items are fewer than a batch of 64, which"):
        stored = open_dataset(config.data, 64)
    batch = [stored.training[i]["caption"] for i in range(64)]
    assert {batch.count(each) for each in batch} <= {1, 2, 3}
    assert len({stored.training[i]["caption"] for i in range(256)}) == 22


@pytest.mark.slow
@pytest.mark.usefixtures("standard_promotion")
def test_a_training_on_buckets_logs_what_it_skips_and_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(vae, "SCALE_ESTIMATION_IMAGES", 24)
    write_folder(tmp_path / "in", 40, sizes=((20, 20), (20, 20), (16, 30)))
    (tmp_path / "in" / "0005.png").write_bytes(b"not a picture")
    (tmp_path / "in" / "0007.png").write_bytes(b"")
    (tmp_path / "tiny.py").write_text(VAE.replace("FOLDER", str(tmp_path)))

    def trained(name, *more):
        run([str(tmp_path / "tiny.py"), "--workdir", str(tmp_path / name), *more])
        return read_lines(tmp_path / name / "log.jsonl")

    whole = trained("a", "--optimiser.decay-fraction", "0")
    first = trained("b", "--steps", "2", "--optimiser.decay-fraction", "0")
    both = trained("b", "--optimiser.decay-fraction", "0")
    assert both[:2] == first
    assert [line["loss"] for line in both] == [line["loss"] for line in whole]
    assert whole[2]["skipped_broken_image"] >= 1
    assert np.isfinite(whole[2]["validation_psnr"])
    (tmp_path / "in" / "0039.png").unlink()
    with pytest.raises(InputError, match=r"data: got \w+, expected \w+ as trained so far"):
        trained("b")
