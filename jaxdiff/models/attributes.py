"""The labels of a classifier: groups of logits, and log-probabilities of known labels."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp

from jaxdiff.core.errors import InputError
from jaxdiff.core.types import Array, Bool, Float
from jaxdiff.core.validate import one_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class LabelGroup:
    """One question with a logit for each possible answer.

    Of an `exclusive` group exactly one label is right (softmax). Otherwise each label is right or
    wrong by itself (independent sigmoids).
    """

    name: str
    labels: tuple[str, ...]
    exclusive: bool = True


@dataclasses.dataclass(frozen=True)
class LabelSet:
    """The groups of a classifier, whose logits lie one after the other.

    A target is two masks over all labels: `targets`, the labels that are right, and `known`,
    those whose value is known. An exclusive group may be known in part: the labels left
    are those that are right or not known.
    """

    groups: tuple[LabelGroup, ...]

    def __post_init__(self) -> None:
        names = [group.name for group in self.groups]
        if not names or len(set(names)) < len(names):
            raise InputError(f"groups: got names {names}, expected at least one, all different")
        for group in self.groups:
            if len(group.labels) < 1 + group.exclusive or len({*group.labels}) < len(group.labels):
                raise InputError(
                    f"labels of {group.name}: got {group.labels}, "
                    f"expected at least {1 + group.exclusive}, all different"
                )

    @property
    def width(self) -> int:
        """The number of logits."""
        return sum(len(group.labels) for group in self.groups)

    @functools.cached_property
    def slices(self) -> dict[str, slice]:
        """Where the logits of each group are."""
        ends = itertools.accumulate((len(g.labels) for g in self.groups), initial=0)
        pairs = zip(self.groups, itertools.pairwise(ends), strict=True)
        return {group.name: slice(*bounds) for group, bounds in pairs}

    def group(self, name: str) -> LabelGroup:
        """The group of that name; InputError if unknown."""
        return next(g for g in self.groups if g.name == one_of("group", name, self.slices))

    def index(self, name: str, label: str) -> int:
        """The position of a label of group `name` among all logits; InputError if unknown."""
        group = self.group(name)
        one_of(name, label, group.labels)
        return self.slices[name].start + group.labels.index(label)

    def log_prob(
        self, logits: Float[Array, "b n"], targets: Bool[Array, "b n"], known: Bool[Array, "b n"]
    ) -> Float[Array, "b"]:
        """log p(what is known), the sum over the groups, in float32; 0 where nothing is known."""
        return self.log_probs(logits, targets, known).sum(-1)

    def log_probs(
        self, logits: Float[Array, "b n"], targets: Bool[Array, "b n"], known: Bool[Array, "b n"]
    ) -> Float[Array, "b g"]:
        """Of each group the log-probability of what is known of it, in float32.

        Exclusive: log sum_left softmax(l), over the labels left. Otherwise: the sum over the known
        labels of log sigmoid(l) where right, and log sigmoid(-l) where wrong.
        """
        l32 = logits.astype(jnp.float32)
        columns = []
        for group in self.groups:
            at = self.slices[group.name]
            log_prob = _exclusive if group.exclusive else _independent
            columns.append(log_prob(l32[:, at], targets[:, at], known[:, at]))
        return jnp.stack(columns, axis=-1)

    def correct(
        self, logits: Float[Array, "b n"], targets: Bool[Array, "b n"], known: Bool[Array, "b n"]
    ) -> tuple[Bool[Array, "b g"], Bool[Array, "b g"]]:
        """Whether the likeliest answer agrees with all that is known, and whether anything is."""
        agrees, asked = [], []
        for group in self.groups:
            at = self.slices[group.name]
            scores, target, is_known = logits[:, at], targets[:, at], known[:, at]
            if group.exclusive:
                best = jax.nn.one_hot(jnp.argmax(scores, -1), scores.shape[-1], dtype=bool)
                agrees.append(jnp.any(best & (target | ~is_known), axis=-1))
            else:
                agrees.append(jnp.all(((scores > 0) == target) | ~is_known, axis=-1))
            asked.append(jnp.any(is_known, axis=-1))
        return jnp.stack(agrees, axis=-1), jnp.stack(asked, axis=-1)


def _exclusive(
    logits: Float[Array, "b k"], targets: Bool[Array, "b k"], known: Bool[Array, "b k"]
) -> Float[Array, "b"]:
    left = targets | ~known
    value = jax.nn.logsumexp(logits, axis=-1, where=left) - jax.nn.logsumexp(logits, axis=-1)
    # Exactly 0, and so is its gradient, where every label is left.
    return jnp.where(left.all(-1), 0.0, value)


def _independent(
    logits: Float[Array, "b k"], targets: Bool[Array, "b k"], known: Bool[Array, "b k"]
) -> Float[Array, "b"]:
    value = jax.nn.log_sigmoid(jnp.where(targets, logits, -logits))
    return jnp.sum(value, axis=-1, where=known)
