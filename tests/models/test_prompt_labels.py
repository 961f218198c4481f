"""Prompts name the labels of a classifier, whatever it was trained on."""

import pytest

from jaxdiff.core.errors import InputError
from jaxdiff.models.attributes import LabelGroup, LabelSet
from jaxdiff.models.prompt_labels import LabelSynonyms, prompt_labels

LABELS = LabelSet(
    (
        LabelGroup(name="class", labels=("n1", "n2", "dog", "hot dog")),
        LabelGroup(name="styles", labels=("ink", "oil painting"), exclusive=False),
    )
)
NAMED = LabelSynonyms(words=(("n1", "golden retriever", "retriever"), ("n2", "cat", "tabby-cat")))


def asked(text):
    """The labels of each group that a prompt asks for, and whether all others are ruled out."""
    found, answers = NAMED.labels_of(text, LABELS), {}
    for group in LABELS.groups:
        at = LABELS.slices[group.name]
        known, targets = found.known[at], found.targets[at]
        assert not (targets & ~known).any()
        if known.any():
            right = {name for name, target in zip(group.labels, targets, strict=True) if target}
            answers[group.name] = (right, bool(known.all()))
    return answers


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("a photo of a Golden  Retriever.", {"class": ({"n1"}, True)}),
        ("two retrievers, one retriever", {"class": ({"n1"}, True)}),
        ("a tabby cat", {"class": ({"n2"}, True)}),
        ("a hot dog", {"class": ({"hot dog"}, True)}),
        ("a dog in the hot sun", {"class": ({"dog"}, True)}),
        (
            "an oil painting of a dog",
            {"class": ({"dog"}, True), "styles": ({"oil painting"}, False)},
        ),
        ("a cat and a dog, in ink", {"styles": ({"ink"}, False)}),  # which of the two?
        ("ink on an oil painting", {"styles": ({"ink", "oil painting"}, True)}),
    ],
)
def test_words_anywhere_name_labels(text, wanted):
    assert asked(text) == wanted


@pytest.mark.parametrize("text", ["", "n1", "a dogfish", "oil"])
def test_a_prompt_without_labels_is_refused(text):
    with pytest.raises(
        InputError, match="expected words of the classifier's labels: golden retriever, cat, ink"
    ):
        NAMED.labels_of(text, LABELS)


def test_labels_are_their_own_words():
    assert prompt_labels({}, LABELS, source="labels.json") == LabelSynonyms()
    assert LabelSynonyms().labels_of("n1", LABELS).targets.tolist() == [True, *[False] * 5]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([["n3", "cat"]], "labels.json: words: got 'n3', expected one of"),
        ([["n1"]], r"labels.json: words: got \('n1',\), expected a label and words for it"),
        ([["n1", "-"]], "expected a label and words for it"),
        ("cat", "labels.json: words: got 'cat', expected"),
    ],
)
def test_words_of_no_label_are_refused(words, message):
    with pytest.raises(InputError, match=message):
        prompt_labels({"words": words}, LABELS, source="labels.json")
