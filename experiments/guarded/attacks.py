"""Attacks on what a run's server recorded: by one who knows the codec, and by one who knows the whole recipe."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from blindtune.audit.inputs import Attacker, Budget, Reconstruction, Truth, attack_inputs, read_exchanges
from blindtune.cli.audit_inputs import adaptive_attacker, codec_of, link_noisy, through_codec
from blindtune.models import SplitModel, Tokenizer
from blindtune.training.shadow import Recipe
from blindtune.wire import Transcript
from experiments.guarded.tasks import public_rows

DEFENCES = ("decorrelation_weight", "noise", "anonymity")
QUICK_BUDGET = Budget(public_rows=800, epochs=5)
QUICK = ("SIP", "nearest token", "nearest, left to right", "BiSR", "unigram guess")
"""What ever was best in first looks, and a floor."""


def attack_run(
    split: SplitModel,
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
    model = next(e.model for e in transcript.events if e.kind == "trunk-forward")
    exchanges = read_exchanges(transcript, model, dim=int(split.config.hidden_size))
    truth = Truth.read(work / "truth.jsonl")
    up = codec_of(transcript, model)
    budget = Budget() if names is None else QUICK_BUDGET
    rows = public_rows(tokenizer, 48, seed)[:8000]
    recipe = Recipe.of(json.loads((work / "out" / "blindtune.json").read_text()))
    say = _printer(work.name)
    static = Attacker(split, rows, simulate=lambda hidden: through_codec(up, hidden), seed=seed, budget=budget)
    found = attack_inputs(exchanges, truth, static, names, sequences=sequences, decode=tokenizer.text, progress=say)
    result = {"static": [to_json(r) for r in found], "adaptive": []}
    if any(stage.options.get(name) for stage in recipe.stages() for name in DEFENCES):
        linked = link_noisy(exchanges, recipe)
        knowing = adaptive_attacker(split, rows, recipe, up, copies=linked.copies, seed=seed, progress=say)
        knowing.budget = budget
        found = attack_inputs(
            linked.exchanges, truth, knowing, names, sequences=sequences, decode=tokenizer.text, progress=say
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
