"""The report of a finished job."""

import pytest

from jaxdiff.cli.progress import (
    Progress,
    note_compile_time,
    print_report,
    usual_compile_time,
)


@pytest.mark.parametrize(
    ("count", "skipped", "message"),
    [
        (1, 0, "1 image in 2.0 s on 1 x cpu: compilation 1.0 s, sampling 0.5 s"),
        (3, 0, "3 images in"),
        (1, 1, "0 images (1 already exists) in"),
        (3, 2, "1 image (2 already exist) in"),
    ],
)
def test_what_was_drawn_and_what_was_there(capsys, count, skipped, message):
    images = [f"{i}.png" for i in range(count)]
    times = {"total_s": 2.0, "compile_s": 1.0, "sample_s": 0.5}
    report = {"images": images, "count": count, "skipped": skipped, "renamed": 0, **times}
    report["device"] = "1 x cpu"
    print_report(report, as_json=False)
    out, err = capsys.readouterr()
    assert out.split() == images
    assert err.startswith(message)


def test_phases_are_lines_where_stderr_is_no_terminal(capsys):
    with Progress(quiet=False) as progress:
        progress.phase("loading a model")
        progress.start(2, compile_s=4.2)
        progress.update(1.0)
        progress.add_images(1)
    assert progress.done == 1
    lines = ["loading a model", "compiling (4 s last time)"]
    assert capsys.readouterr().err == "".join(f"generate: {line}\n" for line in lines)
    with Progress(quiet=True) as progress:
        progress.phase("loading a model")
    assert capsys.readouterr().err == ""


def test_compile_times_are_remembered_where_they_can_be(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert usual_compile_time("a") is None
    note_compile_time("a", 2.04)
    note_compile_time("b", 1)
    assert (usual_compile_time("a"), usual_compile_time("b")) == (2.0, 1)
    for content in ("{", "[]"):
        (tmp_path / "jaxdiff/compile_times.json").write_text(content)
        assert usual_compile_time("a") is None
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    note_compile_time("a", 2)
