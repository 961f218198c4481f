"""The report of a finished job."""

import pytest

from jaxdiff.cli.progress import print_report


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
    report = {"images": images, "skipped": skipped, "renamed": 0, "device": "1 x cpu", **times}
    print_report(report, as_json=False)
    out, err = capsys.readouterr()
    assert out.split() == images
    assert err.startswith(message)
