"""Runs attacks on texts from the start, the middle and the end of training, and scores them.

Only the scoring reads the ground truth. Attacks receive what the provider received. The headline is the attack that
recovers the most tokens at their positions, over all stages and all attacks except floors.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from blindtune.audit.texts.attacker import Attacker
from blindtune.audit.texts.metrics import METRICS, ON_WORDS, Interval, Tokens, bootstrap_mean
from blindtune.audit.texts.observe import Exchange, GroundTruth, Observed, TrueCall
from blindtune.audit.texts.registry import ATTACKS, Attack
from blindtune.errors import ConfigError, TranscriptError

STAGES = ("start", "middle", "end")
Decode = Callable[[Sequence[int]], str]


@dataclass(frozen=True)
class Reconstruction:
    """Holds the result of one attack on the texts of one stage.

    Attributes:
        floor: whether the attack observes nothing.
        seconds: run time, including the training on public text unless an earlier attack has done it.
        metrics: mean of each metric over texts (for accuracy, over tokens) with its 95% interval, by name.
        guesses: guessed token ids of each text, for reports.
    """

    attack: str
    stage: str
    floor: bool
    sequences: int
    tokens: int
    seconds: float
    metrics: dict[str, Interval]
    guesses: list[list[int]]

    @property
    def accuracy(self) -> float:
        """Returns the fraction of the tokens that were recovered at their positions."""
        return self.metrics["accuracy"].mean


def attack_texts(
    exchanges: Sequence[Exchange],
    ground_truth: GroundTruth,
    attacker: Attacker,
    attacks: Sequence[str] | None = None,
    *,
    sequences: int = 64,
    part: str | None = "train",
    decode: Decode | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> list[Reconstruction]:
    """Runs every attack at every stage. Attacks on gradients are left out if no gradient was sent.

    Args:
        attacks: names in the registry; all if None.
        sequences: number of texts for each stage. If two stages would have the same calls, only the first one is run.
        part: part of the data, such as `train`, to which the attacked calls belong; all parts if None.
        decode: maps tokens to text. If given, ROUGE and METEOR compare words.
        progress: callback invoked with a line of text before each attack, and with its result after it.
    Raises:
        TranscriptError: the ground truth lacks a call, or has other lengths; no call belongs to this part.
        ConfigError: there is no such attack.
    """
    chosen = _chosen(attacks)
    calls = [(exchange, ground_truth.of(exchange)) for exchange in exchanges]
    calls = [(exchange, call) for exchange, call in calls if part is None or call.part == part]
    if not calls:
        raise TranscriptError(
            f"None of {len(exchanges)} forward calls is of the part {part!r}.", remedy="Name another part."
        )
    results: list[Reconstruction] = []
    for stage, stage_calls in _stages(calls, sequences):
        observed = Observed.join([_checked(exchange, call) for exchange, call in stage_calls]).first(sequences)
        texts = [ids for _, call in stage_calls for ids in call.ids][:sequences]
        for attack in chosen:
            if not attack.applies(observed):
                continue
            progress(f"{stage}: {attack.name}")
            began = time.monotonic()
            packed = attack.run(observed, attacker)
            seconds = time.monotonic() - began
            guesses = [guess.tolist() for guess in packed.split(observed.lengths.tolist())]
            metrics = score(texts, guesses, decode)
            result = Reconstruction(
                attack.name, stage, attack.floor, len(texts), len(packed), seconds, metrics, guesses
            )
            progress(f"{stage}: {attack.name}: {result.accuracy:.1%} of tokens in {seconds:.0f} s")
            results.append(result)
    return results


def headline(results: Sequence[Reconstruction]) -> Reconstruction:
    """Returns the attack and stage with the highest accuracy, without floors. Raises `ValueError` if there is none."""
    return max((result for result in results if not result.floor), key=lambda result: result.accuracy)


def score(
    texts: Sequence[Sequence[int]], guesses: Sequence[Sequence[int]], decode: Decode | None
) -> dict[str, Interval]:
    """Returns the mean of each metric over texts. Accuracy is weighted by length, so that it is a mean over tokens."""
    result: dict[str, Interval] = {}
    for name, metric in METRICS.items():
        pairs: list[tuple[Tokens, Tokens]] = list(zip(texts, guesses, strict=True))
        if decode is not None and name in ON_WORDS:
            pairs = [(decode(a).split(), decode(b).split()) for a, b in zip(texts, guesses, strict=True)]
        weights = [float(len(text)) if name == "accuracy" else 1.0 for text in texts]
        result[name] = bootstrap_mean([metric(a, b) for a, b in pairs], weights=weights)
    return result


def _chosen(attacks: Sequence[str] | None) -> list[Attack]:
    """Returns the attacks with these names; all if None. Raises `ConfigError` for an unknown name."""
    unknown = [name for name in attacks or [] if name not in ATTACKS]
    if unknown:
        raise ConfigError(f"There is no attack {unknown[0]!r}.", remedy=f"Use some of: {', '.join(ATTACKS)}.")
    return [ATTACKS[name] for name in attacks] if attacks is not None else list(ATTACKS.values())


Call = tuple[Exchange, TrueCall]


def _stages(calls: Sequence[Call], sequences: int) -> list[tuple[str, Sequence[Call]]]:
    """Returns the first calls, the calls around the middle, and the last calls. Stages with equal calls count once."""
    start = first_calls(calls, sequences)
    end = list(reversed(first_calls(list(reversed(calls)), sequences)))
    centre = max((len(calls) - len(start)) // 2, 0)
    middle = first_calls(calls[centre:], sequences)
    result: list[tuple[str, Sequence[Call]]] = []
    for stage, stage_calls in zip(STAGES, (start, middle, end), strict=True):
        events = [exchange.step for exchange, _ in stage_calls]
        if all(events != [exchange.step for exchange, _ in earlier] for _, earlier in result):
            result.append((stage, stage_calls))
    return result


def first_calls(calls: Sequence[Call], sequences: int) -> list[Call]:
    """Returns the first calls that together have at least `sequences` texts; all calls if they have fewer."""
    taken: list[Call] = []
    count = 0
    for exchange, call in calls:
        if count >= sequences:
            break
        taken.append((exchange, call))
        count += len(call.ids)
    return taken


def _checked(exchange: Exchange, call: TrueCall) -> Observed:
    """Reads the tensors of an exchange. Raises `TranscriptError` if the ground truth has other lengths."""
    observed = exchange.read()
    lengths = [len(ids) for ids in call.ids]
    if observed.lengths.tolist() != lengths:
        raise TranscriptError(
            f"The truth says that event {exchange.step} had texts of {lengths[:8]} tokens; the transcript says "
            f"{observed.lengths.tolist()[:8]}.",
            remedy="Use the file that the client wrote during this very run.",
        )
    return observed
