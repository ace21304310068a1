"""Chooses layers and a classifier for frozen features, by cross-validation on the training examples alone.

Every group of layers is tried with logistic regression and a kernel classifier (RBF); then more strengths of
regularization and a small network on the best group. The candidate with the best accuracy on held-out folds wins, and
is fitted again on all examples. All of this runs on the client.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from blindtune.errors import ConfigError
from blindtune.labels.head import Head, KernelHead, LinearHead, TwoLayerHead

Kind = Literal["logistic", "rbf", "mlp"]
"""Names of the classifiers."""
SEARCHED = 3000
"""Largest number of examples in the search. The winner is fitted on all."""
FOLDS = 5
SMALL = 2000
"""Number of examples up to which all folds are held out in turn; with more, one fold is held out once or twice."""

CLASSES: dict[str, type[Head]] = {"logistic": LinearHead, "rbf": KernelHead, "mlp": TwoLayerHead}
"""The classifiers by name."""
COARSE: dict[str, list[dict[str, float]]] = {
    "logistic": [{"l2": 300.0}, {"l2": 3000.0}],
    "rbf": [{"gamma": 0.25, "ridge": 0.3}, {"gamma": 1.0, "ridge": 0.3}],
    "mlp": [],
}
"""Settings that are tried on every group of layers."""
FINE: dict[str, list[dict[str, float]]] = {
    "logistic": [{"l2": 30.0}, {"l2": 1000.0}],
    "rbf": [{"gamma": g, "ridge": r} for g in (0.25, 0.5, 1.0) for r in (0.05, 0.15, 1.0)],
    "mlp": [{}],
}
"""Settings that are tried on the best group alone."""


@dataclass(frozen=True)
class Candidate:
    """A classifier on a group of layers.

    Attributes:
        layers: name of the group.
        kind: name of the classifier.
        settings: its settings.
        accuracy: mean accuracy on held-out examples; NaN if none were held out.
    """

    layers: str
    kind: str
    settings: dict[str, float] = field(default_factory=dict[str, float])
    accuracy: float = math.nan

    def __str__(self) -> str:
        settings = ", ".join(f"{name} {value:g}" for name, value in self.settings.items())
        return f"{self.kind} on {self.layers}" + (f" ({settings})" if settings else "")


@dataclass(frozen=True)
class Choice:
    """The chosen classifier, fitted on all examples.

    Attributes:
        chosen: the candidate with the best held-out accuracy.
        tried: all candidates.
    """

    head: Head
    chosen: Candidate
    tried: list[Candidate]


def layer_groups(
    layers: Sequence[int], states: int, pairs: str, only: Literal["choose", "last", "upper", "all"] = "choose"
) -> dict[str, list[int]]:
    """Returns groups of the parts that a readout gives, by name: indices among the parts.

    Args:
        layers: indices of the states in the readout; none for the last alone.
        states: number of the model's states.
        pairs: how pairs of texts are read (`Backbone`): the parts are the layers of the joint sequence, then those of
            |u − v|, then those of u · v.
        only: the layers to use; `choose` for one group with the last, one with the upper half, and one with all.
    """
    known = list(layers) or [states - 1]
    k = len(known)
    sets = {
        "last": ("the last layer", [k - 1]),
        "upper": ("the upper layers", [i for i, layer in enumerate(known) if layer >= states // 2]),
        "all": ("all layers", list(range(k))),
    }
    named: dict[str, list[int]] = {}
    for key, (name, members) in sets.items():
        if only in ("choose", key) and members and members not in named.values():
            named[name] = members
    if pairs == "joint":
        return named
    groups: dict[str, list[int]] = {}
    for name, members in named.items():
        offset = k if pairs == "both" else 0
        apart = [start + i for start in (offset, offset + k) for i in members]
        if pairs == "both":
            groups[f"{name} of pairs"] = members
            groups[f"{name} of pairs and of each text"] = [*members, *apart]
        else:
            groups[f"{name} of each text"] = apart
    return groups


def choose(
    features: Tensor,
    labels: Tensor,
    classes: int,
    groups: Mapping[str, Sequence[int]],
    of: int,
    kinds: Sequence[Kind] = get_args(Kind),
    on_candidate: Callable[[int, int], None] | None = None,
) -> Choice:
    """Chooses the candidate with the best held-out accuracy, and fits it on all examples.

    Args:
        features: `(N, of · d)`.
        labels: `(N,)`.
        classes: K.
        groups: parts of the features that candidates read, by name.
        of: number of equal parts of the features.
        kinds: classifiers to try.
        on_candidate: callback with the number of candidates done and the number of all.
    Raises:
        ConfigError: there are fewer than two examples.
    """
    if len(labels) < 2:
        raise ConfigError(f"{len(labels)} example is too few to fit a classifier.", remedy="Use more examples.")
    coarse = [Candidate(name, kind, settings) for name in groups for kind in kinds for settings in COARSE[kind]]

    def fine(best: Candidate | None) -> list[Candidate]:
        layers = next(iter(groups)) if best is None else best.layers
        return [Candidate(layers, kind, settings) for kind in kinds for settings in FINE[kind]]

    def make(candidate: Candidate) -> Head:
        arguments: dict[str, Any] = {**candidate.settings, "parts": groups[candidate.layers], "of": of}
        return CLASSES[candidate.kind](features.shape[1], classes, **arguments)

    return choose_among([coarse, fine], make, features, labels, on_candidate)


def choose_among(
    rounds: Sequence[Sequence[Candidate] | Callable[[Candidate | None], Sequence[Candidate]]],
    make: Callable[[Candidate], Head],
    features: Tensor,
    labels: Tensor,
    on_candidate: Callable[[int, int], None] | None = None,
) -> Choice:
    """Chooses the candidate with the best held-out accuracy, and fits it on all features `(N, d)`, labels `(N,)`.

    Args:
        rounds: candidates of each round, or a function that returns them for the best candidate so far.
        make: makes an unfitted head.
        on_candidate: callback with the number of candidates done and the number of all in this round and before.
    Raises:
        ConfigError: there are fewer than two examples.
    """
    if len(labels) < 2:
        raise ConfigError(f"{len(labels)} example is too few to fit a classifier.", remedy="Use more examples.")
    search = _Search(features, labels, make)
    for candidates in rounds:
        some = candidates(search.best if search.tried else None) if callable(candidates) else candidates
        total = len(search.tried) + len(some)
        for candidate in some:
            search.attempt(candidate)
            if on_candidate is not None:
                on_candidate(len(search.tried), total)
    head = make(search.best)
    if isinstance(head, KernelHead):
        x, y = search.fit_on_fold(head, 0)
        head.fit_temperature(x, y)
    head.fit(features, labels)
    return Choice(head, search.best, [candidate for candidate, _ in search.tried])


class _Search:
    """Evaluates candidates on held-out folds. The arguments are those of `choose_among`."""

    def __init__(self, features: Tensor, labels: Tensor, make: Callable[[Candidate], Head]) -> None:
        some = _in_random_order(len(labels))[:SEARCHED]
        self._features, self._labels, self._make = features[some], labels[some], make
        self._folds = _folds(self._labels)
        self.tried: list[tuple[Candidate, float]] = []
        """Candidates with their accuracy, and the mean loss of each."""

    @property
    def best(self) -> Candidate:
        """The candidate with the best accuracy; of equal ones, that with the smallest loss."""
        return max(self.tried, key=lambda pair: (pair[0].accuracy, -pair[1]))[0]

    def attempt(self, candidate: Candidate) -> None:
        """Fits and scores a candidate on all folds."""
        hits, loss, count = 0, 0.0, 0
        for number in range(len(self._folds)):
            head = self._make(candidate)
            x, y = self.fit_on_fold(head, number)
            if isinstance(head, KernelHead):
                head.fit_temperature(x, y)
            with torch.no_grad():
                logits = head(x)
            hits += int((logits.argmax(-1) == y).sum())
            loss += float(torch.nn.functional.cross_entropy(logits, y, reduction="sum"))
            count += len(y)
        self.tried.append((replace(candidate, accuracy=hits / count), loss / count))

    def fit_on_fold(self, head: Head, number: int) -> tuple[Tensor, Tensor]:
        """Fits a head on all folds but one. Returns the features and labels of that one."""
        held = self._folds[number]
        kept = torch.ones(len(self._labels), dtype=torch.bool)
        kept[held] = False
        head.fit(self._features[kept], self._labels[kept])
        return self._features[held], self._labels[held]


def _in_random_order(count: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(0))


def _folds(labels: Tensor) -> list[Tensor]:
    """Returns indices of the held-out examples of each round, `FOLDS` disjoint parts with each class in all of them."""
    order = torch.argsort(labels, stable=True)  # neighbours have the same class, so every fold gets some of each
    folds = [order[start::FOLDS] for start in range(min(FOLDS, len(labels)))]
    return folds if len(labels) <= SMALL else folds[:2]
