"""Attacks run and scored: at the start, in the middle and at the end of training, beside floors. The best one counts.

Only the scoring reads the truth; attacks get what the provider saw. The headline is the attack that recovers most
tokens in their places, over all attacks that look at something and all stages.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from blindtune.audit.inputs.attacker import Attacker
from blindtune.audit.inputs.metrics import METRICS, ON_WORDS, Interval, Tokens, bootstrap_mean
from blindtune.audit.inputs.observe import Exchange, Observed, TrueCall, Truth
from blindtune.audit.inputs.registry import ATTACKS, Attack
from blindtune.errors import ConfigError, TranscriptError

STAGES = ("start", "middle", "end")
Decode = Callable[[Sequence[int]], str]


@dataclass(frozen=True)
class Reconstruction:
    """How well one attack read the texts of one stage.

    Attributes:
        floor: it looked at nothing.
        seconds: what it took, with what it learned from public text first if no earlier attack had.
        metrics: name -> mean over texts (of accuracy: over tokens) with its 95% interval.
        guesses: token ids, for reports that show them.
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
        """Part of the tokens that were recovered in their places."""
        return self.metrics["accuracy"].mean


def attack_inputs(
    exchanges: Sequence[Exchange],
    truth: Truth,
    attacker: Attacker,
    attacks: Sequence[str] | None = None,
    *,
    sequences: int = 64,
    part: str | None = "train",
    decode: Decode | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> list[Reconstruction]:
    """Every attack at every stage. Attacks on gradients are left out where there were none.

    Args:
        attacks: names in the registry; all if None.
        sequences: texts for each stage. If there are too few for three stages, stages that would be equal are one.
        part: of the truth's calls; all if None.
        decode: tokens to text; then ROUGE and METEOR are on words.
        progress: told before each attack, and its result after.
    Raises:
        TranscriptError: the truth lacks a call, or has other lengths; no call is of that part.
        ConfigError: no such attack.
    """
    chosen = _chosen(attacks)
    calls = [(exchange, truth.of(exchange)) for exchange in exchanges]
    calls = [(exchange, call) for exchange, call in calls if part is None or call.part == part]
    if not calls:
        raise TranscriptError(
            f"None of {len(exchanges)} forward calls is of the part {part!r}.", remedy="Name another part."
        )
    results: list[Reconstruction] = []
    for stage, some in _stages(calls, sequences):
        observed = Observed.join([_checked(exchange, call) for exchange, call in some]).first(sequences)
        texts = [ids for _, call in some for ids in call.ids][:sequences]
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
    """The attack and stage with the most tokens in their places; floors don't count. Raises `ValueError` for none."""
    return max((result for result in results if not result.floor), key=lambda result: result.accuracy)


def score(
    texts: Sequence[Sequence[int]], guesses: Sequence[Sequence[int]], decode: Decode | None
) -> dict[str, Interval]:
    """All metrics' means over texts; accuracy is weighted by length, so that it is over tokens."""
    result: dict[str, Interval] = {}
    for name, metric in METRICS.items():
        pairs: list[tuple[Tokens, Tokens]] = list(zip(texts, guesses, strict=True))
        if decode is not None and name in ON_WORDS:
            pairs = [(decode(a).split(), decode(b).split()) for a, b in zip(texts, guesses, strict=True)]
        weights = [float(len(text)) if name == "accuracy" else 1.0 for text in texts]
        result[name] = bootstrap_mean([metric(a, b) for a, b in pairs], weights=weights)
    return result


def _chosen(attacks: Sequence[str] | None) -> list[Attack]:
    unknown = [name for name in attacks or [] if name not in ATTACKS]
    if unknown:
        raise ConfigError(f"There is no attack {unknown[0]!r}.", remedy=f"Use some of: {', '.join(ATTACKS)}.")
    return [ATTACKS[name] for name in attacks] if attacks is not None else list(ATTACKS.values())


Call = tuple[Exchange, TrueCall]


def _stages(calls: Sequence[Call], sequences: int) -> list[tuple[str, Sequence[Call]]]:
    """The first calls, those around the middle, and the last; without repetition."""
    start = first_calls(calls, sequences)
    end = list(reversed(first_calls(list(reversed(calls)), sequences)))
    centre = max((len(calls) - len(start)) // 2, 0)
    middle = first_calls(calls[centre:], sequences)
    result: list[tuple[str, Sequence[Call]]] = []
    for stage, some in zip(STAGES, (start, middle, end), strict=True):
        events = [exchange.step for exchange, _ in some]
        if all(events != [exchange.step for exchange, _ in earlier] for _, earlier in result):
            result.append((stage, some))
    return result


def first_calls(calls: Sequence[Call], sequences: int) -> list[Call]:
    """The first calls that have so many texts together, with their truth."""
    taken: list[Call] = []
    count = 0
    for exchange, call in calls:
        if count >= sequences:
            break
        taken.append((exchange, call))
        count += len(call.ids)
    return taken


def _checked(exchange: Exchange, call: TrueCall) -> Observed:
    observed = exchange.read()
    lengths = [len(ids) for ids in call.ids]
    if observed.lengths.tolist() != lengths:
        raise TranscriptError(
            f"The truth says that event {exchange.step} had texts of {lengths[:8]} tokens; the transcript says "
            f"{observed.lengths.tolist()[:8]}.",
            remedy="Use the file that the client wrote during this very run.",
        )
    return observed
