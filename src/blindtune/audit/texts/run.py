"""Audits texts: attacks a recorded cut model and an undefended control, and sums up the results."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

from torch import Tensor

from blindtune.audit.texts.attacker import Attacker
from blindtune.audit.texts.evaluate import Reconstruction, attack_texts, first_calls, headline
from blindtune.audit.texts.link import Linked
from blindtune.audit.texts.observe import Exchange, GroundTruth, Observed, read_exchanges
from blindtune.data.public_text import read_lines
from blindtune.errors import ConfigError, TranscriptError
from blindtune.models import Cut, CutModel, FrozenBackbone, Tokenizer, load_backbone
from blindtune.models.cut.parts import pad_rows
from blindtune.wire import Codec, RecordedModel, Transcript, dequantize, quantize

CONTROL_MUST = 0.8
"""Fraction of the tokens that the strongest attack must recover from undefended hidden states for a valid audit."""
MOST_PUBLIC = 20_000
"""Maximum number of public texts that attackers learn from."""


class Adaptive(Protocol):
    """Describes an attacker who knows the defence, such as `blindtune.texts.ShadowClient`."""

    def link(self, exchanges: Sequence[Exchange]) -> Linked:
        """Returns the exchanges with s_A averaged over all messages of the same text, if the design allows that."""
        ...

    def attacker(
        self,
        cut_model: CutModel,
        rows: list[list[int]],
        codec: Codec,
        *,
        copies: float,
        seed: int,
        say: Callable[[str], None],
    ) -> Attacker:
        """Returns an attacker who simulates the client.

        Args:
            cut_model: the pretrained model.
            rows: token rows of public texts.
            codec: encoding of s_A in the transcript.
            copies: number of messages over which s_A was averaged (`Linked.copies`).
            seed: seed of all random draws.
            say: callback invoked with lines of progress.
        """
        ...


@dataclass(frozen=True)
class TextsAudit:
    """Holds the results of attacks on a recorded run, and of the same attacks on undefended hidden states.

    Attributes:
        results: results of the static attacker, who has the pretrained bottom and knows the codec.
        control: results of the static attacker on undefended hidden states.
        adaptive: results of the attacker who knows the design, its options and how long the client trains; None if
            there was no such attacker.
    """

    results: list[Reconstruction]
    control: list[Reconstruction]
    adaptive: list[Reconstruction] | None = None

    @property
    def best(self) -> Reconstruction:
        """Returns the result with the highest accuracy, of both attackers."""
        return headline([*self.results, *(self.adaptive or [])])

    @property
    def valid(self) -> bool:
        """Returns whether the attacks succeed on undefended hidden states."""
        return max(result.accuracy for result in self.control if not result.floor) >= CONTROL_MUST

    def sentence(self) -> str:
        """Returns the result in one sentence."""
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
            f"attacks that observe nothing recover {floor:.0%}, attacks on undefended hidden states "
            f"{control.accuracy:.0%}."
        )

    def to_json(self) -> dict[str, Any]:
        """Returns all numbers."""
        return {
            "valid": self.valid,
            "sentence": self.sentence(),
            "attacks": [_to_json(result) for result in self.results],
            "adaptive": None if self.adaptive is None else [_to_json(result) for result in self.adaptive],
            "control": [_to_json(result) for result in self.control],
        }


def _to_json(result: Reconstruction) -> dict[str, Any]:
    return {
        "attack": result.attack,
        "stage": result.stage,
        "floor": result.floor,
        "sequences": result.sequences,
        "tokens": result.tokens,
        "seconds": round(result.seconds, 1),
        "metrics": {name: [i.mean, i.low, i.high] for name, i in result.metrics.items()},
    }


def audit_texts(
    transcript: str | Path,
    ground_truth: str | Path,
    public: Sequence[str | Path],
    *,
    model: str | None = None,
    adaptive: Adaptive | None = None,
    sequences: int = 32,
    device: str = "cpu",
    seed: int = 0,
    say: Callable[[str], None] = lambda _: None,
) -> TextsAudit:
    """Attacks a cut model's transcript and an undefended control, and scores both against the true texts.

    The control consists of hidden states that the pretrained bottom computes here for the same texts.

        audit = audit_texts("seen-by-server", "sent.jsonl", ["news.txt"], adaptive=ShadowClient("out/"))
        print(audit.sentence())

    Args:
        transcript: a folder that `blindtune serve --record` wrote.
        ground_truth: the file that `blindtune texts train --ground-truth` wrote.
        public: files of public text that attackers learn from.
        model: name or folder of the pretrained model; if None, the model that the transcript names.
        adaptive: an attacker who knows the defence, such as `blindtune.texts.ShadowClient`; none if None.
        sequences: number of texts to attack at each of three stages of the run.
        device: device that runs the attacks.
        seed: seed of all random draws.
        say: callback invoked with lines of progress.
    Raises:
        TranscriptError: the transcript has no messages of a cut model, or the ground truth belongs to another run.
        ConfigError: there is no public text, or no such device.
    """
    if not public:
        raise ConfigError(
            "Attackers learn from public text.", remedy="Give some with --public: lines of text, or JSON lines."
        )
    opened = Transcript(Path(transcript))
    name, recorded = _cut_model(opened)
    backbone, cut_model = _load(opened, model, recorded, device)
    truth = GroundTruth.read(Path(ground_truth))
    exchanges = read_exchanges(opened, name, dim=int(backbone.config.hidden_size))
    calls = [(exchange, truth.of(exchange)) for exchange in exchanges]
    calls = [(exchange, call) for exchange, call in calls if call.part == "train"]  # evaluations aren't attacked
    if not calls:
        raise TranscriptError(
            f"{transcript} has no message of training.", remedy="Record a run, and keep its --ground-truth."
        )
    exchanges = [exchange for exchange, _ in calls]
    longest = max(len(ids) for _, call in calls for ids in call.ids)
    rows = _public_rows([Path(path) for path in public], backbone, longest, seed)
    codec = _codec_of(opened, name)
    say(f"{len(exchanges)} messages of {name}; {len(rows)} public texts to learn from")
    static = Attacker(cut_model, rows, simulate=lambda hidden: through_codec(codec, hidden), seed=seed)
    results = attack_texts(exchanges, truth, static, sequences=sequences, progress=say)
    knowing = None
    if adaptive is not None:
        say("Adaptive attacker: knows the design and its options")
        linked = adaptive.link(exchanges)
        say(f"{linked.copies:g} messages of a text are linked")
        attacker = adaptive.attacker(cut_model, rows, codec, copies=linked.copies, seed=seed, say=say)
        knowing = attack_texts(linked.exchanges, truth, attacker, sequences=sequences, progress=say)
    say("Control: the same texts, undefended")
    clean = Attacker(cut_model, rows, seed=seed)
    undefended = [_undefended(exchange, truth, clean) for exchange, _ in first_calls(calls, sequences)]
    control = attack_texts(undefended, truth, clean, sequences=sequences, progress=say)
    return TextsAudit(results, control, knowing)


def through_codec(codec: Codec, hidden: Tensor) -> Tensor:
    """Returns hidden states `(N, d)` as the receiver decodes them."""
    return dequantize("hidden", quantize("hidden", hidden, codec), codec, hidden.shape[1])


def _cut_model(transcript: Transcript) -> tuple[str, RecordedModel]:
    """Returns the name and the record of the first cut model that was called. Raises `TranscriptError` without one."""
    recorded = transcript.recording.models
    cut = [name for name, m in recorded.items() if m.bottom is not None and m.top is not None]
    called = [name for name in cut if any(e.kind == "trunk-forward" and e.model == name for e in transcript.events)]
    if not called:
        raise TranscriptError(
            f"{transcript.folder} has no message of a cut model.", remedy="Record `blindtune serve --cut`."
        )
    return called[0], recorded[called[0]]


def _load(
    transcript: Transcript, model: str | None, recorded: RecordedModel, device: str
) -> tuple[FrozenBackbone, CutModel]:
    cut = Cut(recorded.bottom or 0, recorded.top or 0)
    backbone = load_backbone(model or recorded.source, device=device, dtype=recorded.dtype, cut=cut)
    if backbone.fingerprint != recorded.fingerprint or backbone.cut_model is None:
        raise TranscriptError(
            f"{transcript.folder} was recorded on other weights than {backbone.source.requested!r}.",
            remedy="Give the same pretrained model with --model.",
        )
    return backbone, backbone.cut_model


def _public_rows(paths: Sequence[Path], backbone: FrozenBackbone, longest: int, seed: int) -> list[list[int]]:
    """Returns token rows of random public lines, truncated to the length of the client's longest text."""
    tokenizer = Tokenizer(backbone.tokenizer, pad_token_id=backbone.pad_token_id, with_types=False)
    lines = [line for path in paths for line in read_lines(path)]
    random.Random(seed).shuffle(lines)
    return [list(row.ids) for row in tokenizer.rows(lines[:MOST_PUBLIC], max_length=longest)]


def _codec_of(transcript: Transcript, model: str) -> Codec:
    """Returns the codec in which s_A was sent."""
    events = (e for e in transcript.events if e.kind == "trunk-forward" and e.model == model)
    return cast("Codec", next(event.up for event in events))


def _undefended(exchange: Exchange, truth: GroundTruth, attacker: Attacker) -> Exchange:
    """Returns what split learning without a defence would have sent for the same texts, with the pretrained bottom."""
    ids, lengths = pad_rows(truth.of(exchange).ids)

    def read() -> Observed:
        here = lengths.to(attacker.device)
        hidden = attacker.run_bottom(ids.to(attacker.device), here)
        return Observed(lengths, hidden, attacker.run_trunk(hidden, here))

    return Exchange(exchange.step, exchange.forward, read)
