"""Attacks on what a run's server recorded: by one who knows the codec, and by one who knows the whole design."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from blindtune.audit.texts import (
    Attacker,
    Budget,
    GroundTruth,
    Reconstruction,
    attack_texts,
    read_exchanges,
    through_codec,
)
from blindtune.models import CutModel, Tokenizer
from blindtune.texts.shadow import ShadowClient
from blindtune.wire import Codec, Transcript
from experiments.texts.tasks import public_rows

DEFENCES = ("decorrelation_weight", "noise", "anonymity")
QUICK_BUDGET = Budget(public_rows=800, epochs=5)
QUICK = ("SIP", "nearest token", "nearest, left to right", "BiSR", "unigram guess")
"""What ever was best in first looks, and a floor."""


def attack_run(
    cut_model: CutModel,
    tokenizer: Tokenizer,
    work: Path,
    names: Sequence[str] | None,
    *,
    sequences: int,
    seed: int,
) -> dict[str, list[dict[str, Any]]]:
    """Both attackers' results; the adaptive one's is empty where nothing but a codec and plain tuning is to be known.

    Args:
        names: of attacks; all if None, which then may also spend more.
    """
    transcript = Transcript(work / "seen")
    first = next(event for event in transcript.events if event.kind == "trunk-forward")
    exchanges = read_exchanges(transcript, first.model, dim=int(cut_model.config.hidden_size))
    ground_truth = GroundTruth.read(work / "ground-truth.jsonl")
    up = cast("Codec", first.up)
    budget = Budget() if names is None else QUICK_BUDGET
    rows = public_rows(tokenizer, 48, seed)[:8000]
    shadow = ShadowClient(work / "out")
    say = _printer(work.name)
    static = Attacker(cut_model, rows, simulate=lambda hidden: through_codec(up, hidden), seed=seed, budget=budget)
    found = attack_texts(
        exchanges, ground_truth, static, names, sequences=sequences, decode=tokenizer.text, progress=say
    )
    result = {"static": [to_json(r) for r in found], "adaptive": []}
    if any(stage.options.get(name) for stage in shadow.stages for name in DEFENCES):
        linked = shadow.link(exchanges)
        knowing = shadow.attacker(cut_model, rows, up, copies=linked.copies, seed=seed, say=say)
        knowing.budget = budget
        found = attack_texts(
            linked.exchanges, ground_truth, knowing, names, sequences=sequences, decode=tokenizer.text, progress=say
        )
        result["adaptive"] = [to_json(r) for r in found]
    return result


def _printer(name: str) -> Any:
    return lambda line: print(f"  {name}: {line}", flush=True)


def to_json(found: Reconstruction) -> dict[str, Any]:
    """What tables need."""
    return {
        "attack": found.attack, "stage": found.stage, "floor": found.floor, "sequences": found.sequences,
        "tokens": found.tokens, "seconds": round(found.seconds, 1),
        **{name: [round(x, 4) for x in (i.mean, i.low, i.high)] for name, i in found.metrics.items()},
    }  # fmt: skip
