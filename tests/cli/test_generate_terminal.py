"""What a finished job says of itself."""

import pytest

from jaxdiff.cli.generate_terminal import print_report


@pytest.mark.parametrize(
    ("pictures", "skipped", "said"),
    [
        (1, 0, "1 picture in 2.0 s (compiled 1.0 s, sampled 0.5 s) on 1 x cpu"),
        (3, 0, "3 pictures in"),
        (1, 1, "0 pictures, 1 was there already in"),
        (3, 2, "1 picture, 2 were there already in"),
    ],
)
def test_what_was_drawn_and_what_was_there(capsys, pictures, skipped, said):
    images = [f"{i}.png" for i in range(pictures)]
    times = {"total_s": 2.0, "compile_s": 1.0, "sample_s": 0.5}
    report = {"images": images, "skipped": skipped, "device": "1 x cpu", **times}
    print_report(report, as_json=False)
    out, err = capsys.readouterr()
    assert out.split() == images
    assert err.startswith(said)
