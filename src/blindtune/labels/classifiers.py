"""Chooses layers and a classifier for frozen features, by cross-validation on the training examples alone.

The candidates are every group of layers with logistic regression, a kernel classifier (RBF) and a small network, each
with a few strengths of regularization. A candidate's score is its mean log-likelihood on the held-out folds among those
whose accuracy is the best; the winner is fitted again on all examples. All of this runs on the client.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from blindtune.errors import ConfigError
from blindtune.labels.head import Head, KernelHead, LinearHead, MLPHead

Kind = Literal["logistic", "rbf", "mlp"]
SEARCHED = 3000
"""Largest number of examples in the search. The winner is fitted on all."""
FOLDS = 5
SMALL = 2000
"""Number of examples up to which all folds are held out in turn; with more, one fold is held out once or twice."""

SETTINGS: dict[Kind, tuple[type[Head], list[dict[str, float]]]] = {
    "logistic": (LinearHead, [{"l2": l2} for l2 in (30.0, 300.0, 1000.0, 3000.0)]),
    "rbf": (KernelHead, [{"gamma": g, "ridge": r} for g in (0.25, 1.0) for r in (0.05, 0.3, 1.0)]),
    "mlp": (MLPHead, [{}]),
}
"""The classifiers, and the settings of each that are tried."""


@dataclass(frozen=True)
class Candidate:
    """A classifier on a group of layers.

    Attributes:
        layers: name of the group.
        kind: name of the classifier.
        settings: its settings.
        accuracy: mean accuracy on held-out examples.
    """

    layers: str
    kind: Kind | Literal["sketch"]
    settings: dict[str, float] = field(default_factory=dict[str, float])
    accuracy: float = 0.0

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
    candidates = [
        Candidate(name, kind, settings) for name in groups for kind in kinds for settings in SETTINGS[kind][1]
    ]
    kinds_of = {str(kind): SETTINGS[kind][0] for kind in kinds}

    def make(candidate: Candidate) -> Head:
        arguments: dict[str, Any] = {**candidate.settings, "parts": groups[candidate.layers], "of": of}
        return kinds_of[candidate.kind](features.shape[1], classes, **arguments)

    return choose_among(candidates, make, features, labels, on_candidate)


def choose_among(
    candidates: Sequence[Candidate],
    make: Callable[[Candidate], Head],
    features: Tensor,
    labels: Tensor,
    on_candidate: Callable[[int, int], None] | None = None,
) -> Choice:
    """Chooses and fits the best of the candidates on features `(N, d)` and labels `(N,)`.

    Args:
        make: makes an unfitted head.
    Raises:
        ConfigError: there are fewer than two examples.
    """
    if len(labels) < 2:
        raise ConfigError(f"{len(labels)} example is too few to fit a classifier.", remedy="Use more examples.")
    if len(candidates) == 1:
        head = make(candidates[0])
        head.fit(features, labels)
        return Choice(head, candidates[0], list(candidates))
    some = _in_random_order(len(labels))[:SEARCHED]
    folds = _folds(labels[some])
    tried: list[Candidate] = []
    losses: list[float] = []
    for done, candidate in enumerate(candidates):
        hits, loss, count = 0, 0.0, 0
        for held in folds:
            kept = torch.ones(len(some), dtype=torch.bool)
            kept[held] = False
            head = make(candidate)
            head.fit(features[some[kept]], labels[some[kept]])
            x, y = features[some[held]], labels[some[held]]
            if isinstance(head, KernelHead):
                head.fit_temperature(x, y)
            with torch.no_grad():
                logits = head(x)
            hits += int((logits.argmax(-1) == y).sum())
            loss += float(torch.nn.functional.cross_entropy(logits, y, reduction="sum"))
            count += len(y)
        tried.append(Candidate(candidate.layers, candidate.kind, candidate.settings, hits / count))
        losses.append(loss / count)
        if on_candidate is not None:
            on_candidate(done + 1, len(candidates))
    best = max(range(len(tried)), key=lambda index: (tried[index].accuracy, -losses[index]))
    head = make(tried[best])
    if isinstance(head, KernelHead):
        held = folds[0]
        kept = torch.ones(len(some), dtype=torch.bool)
        kept[held] = False
        head.fit(features[some[kept]], labels[some[kept]])
        head.fit_temperature(features[some[held]], labels[some[held]])
    head.fit(features, labels)
    return Choice(head, tried[best], tried)


def _in_random_order(count: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(0))


def _folds(labels: Tensor) -> list[Tensor]:
    """Returns indices of the held-out examples of each round, `FOLDS` disjoint parts with each class in all of them."""
    order = torch.argsort(labels, stable=True)  # neighbours have the same class, so every fold gets some of each
    folds = [order[start::FOLDS] for start in range(min(FOLDS, len(labels)))]
    return folds if len(labels) <= SMALL else folds[:2]
