"""`blindtune audit --truth`: what a split model's server could read of the texts."""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from rich.table import Table

from blindtune.cli.console import console
from blindtune.errors import ConfigError, TranscriptError

if TYPE_CHECKING:
    from torch import Tensor

    from blindtune.audit.inputs import Attacker, Exchange, Linked, Reconstruction, Truth
    from blindtune.models import SplitModel, Tokenizer
    from blindtune.training.shadow import Recipe
    from blindtune.wire import Codec, Transcript

CONTROL_MUST = 0.8
"""Part of the tokens that the strongest attack must recover from undefended hidden states for an audit to count."""


@dataclass(frozen=True)
class InputAudit:
    """Attacks on what was recorded, and the same ones on what undefended split learning would have sent.

    Attributes:
        results: of the static attacker, who has the pretrained bottom and knows the codec.
        adaptive: of the one who knows the design, its options and how long the client trains; None if it wasn't told.
    """

    results: "list[Reconstruction]"
    control: "list[Reconstruction]"
    adaptive: "list[Reconstruction] | None" = None

    @property
    def best(self) -> "Reconstruction":
        """Of both attackers."""
        from blindtune.audit.inputs import headline

        return headline([*self.results, *(self.adaptive or [])])

    @property
    def valid(self) -> bool:
        return max(result.accuracy for result in self.control if not result.floor) >= CONTROL_MUST

    def sentence(self) -> str:
        from blindtune.audit.inputs import headline

        best, control = self.best, headline(self.control)
        floor = max(result.accuracy for result in self.results if result.floor)
        if not self.valid:
            return (
                f"Void: on undefended hidden states the strongest attack ({control.attack}) recovers "
                f"{control.accuracy:.0%} of the tokens, and must recover {CONTROL_MUST:.0%}. Give more --public text."
            )
        return (
            f"The server can read {best.accuracy:.0%} of the tokens ({best.attack}, {best.stage} of the run"
            f"{', adaptive' if best in (self.adaptive or []) else ''}); "
            f"without looking {floor:.0%}; of undefended hidden states {control.accuracy:.0%}."
        )

    def to_json(self) -> dict[str, Any]:
        def rows(results: "list[Reconstruction]") -> list[dict[str, Any]]:
            return [
                {
                    "attack": r.attack,
                    "stage": r.stage,
                    "floor": r.floor,
                    "sequences": r.sequences,
                    "tokens": r.tokens,
                    "seconds": round(r.seconds, 1),
                    "metrics": {name: [i.mean, i.low, i.high] for name, i in r.metrics.items()},
                }
                for r in results
            ]

        return {"valid": self.valid, "sentence": self.sentence(), "attacks": rows(self.results),
                "adaptive": None if self.adaptive is None else rows(self.adaptive),
                "control": rows(self.control)}  # fmt: skip


def run_input_audit(
    folder: Path,
    truth_file: Path,
    public: list[Path],
    *,
    model: str | None,
    run: Path | None,
    sequences: int,
    device: str,
    seed: int,
) -> InputAudit:
    """Attacks a split model's transcript, with progress, and a control that is made here.

    Args:
        run: the checkpoint's folder, of which the adaptive attacker reads `blindtune.json` alone; none without it.
        device: where the attacks run.
    Raises:
        TranscriptError: a transcript without a split model's messages, or a truth of another run.
        ConfigError: no public text, or no such device.
    """
    from blindtune.audit.inputs import Attacker, Truth, attack_inputs, read_exchanges
    from blindtune.audit.inputs.evaluate import first_calls
    from blindtune.methods.guarded import read_run
    from blindtune.models import Cut, Tokenizer, load_backbone
    from blindtune.training.shadow import Recipe
    from blindtune.wire import Transcript

    if not public:
        raise ConfigError(
            "Attackers learn from public text.", remedy="Give some with --public: lines of text, or JSON lines."
        )
    recipe = None if run is None else Recipe.of(read_run(run))
    transcript = Transcript(folder)
    split = {name: m for name, m in transcript.recording.models.items() if m.bottom is not None and m.top is not None}
    called = [name for name in split if any(e.kind == "trunk-forward" and e.model == name for e in transcript.events)]
    if not called:
        raise TranscriptError(f"{folder} has no message of a split model.", remedy="Record `blindtune serve --split`.")
    recorded = split[called[0]]
    cut = Cut(recorded.bottom or 0, recorded.top or 0)
    backbone = load_backbone(model or recorded.source, device=device, dtype=recorded.dtype, cut=cut)
    if backbone.fingerprint != recorded.fingerprint:
        raise TranscriptError(
            f"{folder} was recorded on other weights than {backbone.source.requested!r}.",
            remedy="Give the same pretrained model with --model.",
        )
    tokenizer = Tokenizer(backbone.tokenizer, pad_token_id=backbone.pad_token_id, with_types=False)
    truth = Truth.read(truth_file)
    recorded_calls = read_exchanges(transcript, called[0], dim=int(backbone.config.hidden_size))
    calls = [(exchange, truth.of(exchange)) for exchange in recorded_calls]
    calls = [
        (exchange, call) for exchange, call in calls if call.part == "train"
    ]  # others were sent as often as scored
    if not calls:
        raise TranscriptError(f"{folder} has no message of training.", remedy="Record a run, and keep its --truth.")
    exchanges = [exchange for exchange, _ in calls]
    longest = max(len(ids) for _, call in calls for ids in call.ids)
    rows = _public_rows(public, tokenizer, longest, seed)
    up = codec_of(transcript, called[0])
    assert backbone.split is not None  # noqa: S101 - it was cut
    attacker = Attacker(backbone.split, rows, simulate=partial(through_codec, up), seed=seed)
    say = partial(console.print, soft_wrap=True, highlight=False)
    say(f"{len(exchanges)} messages of {called[0]}; {len(rows)} public texts to learn from")
    results = attack_inputs(exchanges, truth, attacker, sequences=sequences, progress=say)
    adaptive = None
    if recipe is not None:
        say("Adaptive attacker: knows the design and its options")
        linked = link_noisy(exchanges, recipe)
        say(f"{linked.copies:g} messages of a text are linked")
        knowing = adaptive_attacker(backbone.split, rows, recipe, up, copies=linked.copies, seed=seed, progress=say)
        adaptive = attack_inputs(linked.exchanges, truth, knowing, sequences=sequences, progress=say)
    say("Control: the same texts, undefended")
    clean = Attacker(backbone.split, rows, seed=seed)
    control = attack_inputs(
        [_undefended(exchange, truth, clean) for exchange, _ in first_calls(calls, sequences)],
        truth,
        clean,
        sequences=sequences,
        progress=say,
    )
    return InputAudit(results, control, adaptive)


def link_noisy(exchanges: "Sequence[Exchange]", recipe: "Recipe") -> "Linked":
    """Averages what a text's messages have in common, if fresh noise is all that they differ by."""
    from blindtune.audit.inputs import Linked, link_repeats
    from blindtune.methods.guarded import make_design

    design = make_design(recipe.method, recipe.options)
    if not design.noise:
        return Linked(list(exchanges), 1)
    return link_repeats(exchanges, design.noise * design.clip_norm)


def adaptive_attacker(
    split: "SplitModel",
    rows: list[list[int]],
    recipe: "Recipe",
    up: "Codec",
    *,
    copies: float = 1,
    seed: int,
    progress: Callable[[str], None] = lambda _: None,
) -> "Attacker":
    """An attacker with a shadow client's bottom, who simulates groups of tokens, clipping, noise and codec.

    Args:
        rows: public texts as tokens.
        up: codec of s_A.
        copies: of each text, whose noise was averaged.
    """
    from blindtune.audit.inputs import Attacker
    from blindtune.methods.guarded import make_design
    from blindtune.privacy.randomness import SecureGenerator
    from blindtune.privacy.token_noise import clip_rows
    from blindtune.training.shadow import shadow_bottom

    design = make_design(recipe.method, recipe.options)
    bottom = shadow_bottom(split, recipe, rows, seed=seed, progress=progress) if recipe.changes_bottom else None

    def simulate(hidden: "Tensor") -> "Tensor":
        clean = expected(hidden)
        noise = design.disturb(hidden, SecureGenerator()) - clean
        return through_codec(up, clean + noise / math.sqrt(copies))

    def expected(hidden: "Tensor") -> "Tensor":
        return clip_rows(hidden, design.clip_norm) if design.noise else hidden

    send = design.encoder(split.parts["bottom"])
    return Attacker(split, rows, bottom=bottom, send=send, simulate=simulate, expected=expected, seed=seed)


def print_input_audit(audit: InputAudit) -> None:
    """The table of an audit and its sentence."""
    table = Table(title="What the server could read of the texts", title_justify="left")
    for name in ("attack", "attacker", "stage"):
        table.add_column(name)
    for name in ("tokens in place [95%]", "ROUGE-L", "undefended"):
        table.add_column(name, justify="right")
    both = [(r, "static") for r in audit.results] + [(r, "adaptive") for r in audit.adaptive or [] if not r.floor]
    for result, attacker in sorted(both, key=lambda pair: (pair[0].floor, -pair[0].accuracy)):
        accuracy = result.metrics["accuracy"]
        same = [c.accuracy for c in audit.control if c.attack == result.attack]
        table.add_row(
            result.attack + (" (looks at nothing)" if result.floor else ""),
            "–" if result.floor else attacker,
            result.stage,
            f"{accuracy.mean:.1%} [{accuracy.low:.1%}, {accuracy.high:.1%}]",
            f"{result.metrics['rougeL'].mean:.2f}",
            f"{max(same):.1%}" if same else "–",
        )
    console.print(table)
    console.print(audit.sentence(), style="bold" if audit.valid else "bold red", soft_wrap=True)


def _public_rows(paths: list[Path], tokenizer: "Tokenizer", longest: int, seed: int) -> list[list[int]]:
    """Token rows of public lines, no longer than the client's."""
    from blindtune.cli.public_text import read_lines

    lines = [line for path in paths for line in read_lines(path)]
    random.Random(seed).shuffle(lines)
    return [list(row.ids) for row in tokenizer.rows(lines[:20_000], max_length=longest)]


def codec_of(transcript: "Transcript", model: str) -> "Codec":
    """How s_A travelled."""
    events = (e for e in transcript.events if e.kind == "trunk-forward" and e.model == model)
    return cast("Codec", next(event.up for event in events))


def through_codec(codec: "Codec", hidden: "Tensor") -> "Tensor":
    """Hidden states `(N, d)` as they arrive."""
    from blindtune.wire import dequantize, quantize

    return dequantize("hidden", quantize("hidden", hidden, codec), codec, hidden.shape[1])


def _undefended(exchange: "Exchange", truth: "Truth", attacker: "Attacker") -> "Exchange":
    """The same texts as plain split learning would have sent them with the pretrained bottom."""
    from blindtune.audit.inputs import Exchange, Observed
    from blindtune.models.split import pad_rows

    ids, lengths = pad_rows(truth.of(exchange).ids)

    def read() -> Observed:
        here = lengths.to(attacker.device)
        hidden = attacker.run_bottom(ids.to(attacker.device), here)
        return Observed(lengths, hidden, attacker.run_trunk(hidden, here))

    return Exchange(exchange.step, exchange.forward, read)
