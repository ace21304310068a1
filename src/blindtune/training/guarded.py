"""The loop around a split model: steps, checkpoints, resume, evaluation by likelihood."""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from blindtune.client import RemotePlugin
from blindtune.errors import CheckpointError, ConfigError
from blindtune.files import replace_file
from blindtune.methods.guarded import CausalBatch, Design, Ends, Gradfree, SplitCausalLM
from blindtune.methods.state import SUMMARY, read_tensors, under, write_tensors
from blindtune.privacy.randomness import SecureGenerator
from blindtune.training.batches import BatchPlan, linear_rate
from blindtune.training.questions import TokenizedQuestion

COUNT_EVERY = 25
STATE = "resume.safetensors"
Shape = tuple[int, ...]


def _attention(query: Shape, key: Shape, value: Shape, *_args: object, **_kwargs: object) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_backward(
    gradient: Shape, query: Shape, key: Shape, value: Shape, *_args: object, **_kwargs: object
) -> int:
    return sdpa_backward_flop_count(gradient, query, key, value)


ATTENTION_ON_CPU = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}
"""What torch's counter leaves out: it knows the kernels of GPUs."""


@dataclass(frozen=True)
class GuardedConfig:
    """How long and how fast to train. The learning rate warms up linearly, then falls linearly to `floor`."""

    steps: int = 150
    batch_size: int = 16
    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    clip_gradients: float = 1.0
    """Largest norm of a step's gradient; 0 for any."""
    warmup: int = 10
    floor: float = 0.03
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.steps, self.batch_size) < 1 or not self.learning_rate > 0:
            raise ConfigError(
                f"{self.steps} steps of {self.batch_size} at rate {self.learning_rate}.",
                remedy="Use at least one step, one example and a positive learning rate.",
            )

    def rate(self, step: int) -> float:
        """The factor on the learning rate at step 0, 1, …"""
        return linear_rate(step, self.steps, self.warmup, self.floor)


@dataclass(frozen=True)
class GuardedStep:
    """What one step did: losses by name, bytes of HTTP messages by kind, seconds, and floating-point operations here.

    Operations are those of matrix products and attention, forward and backward, two for each multiplication and sum:
    counted in every 25th step, and taken over by the (padded) token in those between.
    """

    step: int
    losses: dict[str, float]
    traffic: dict[str, int]
    seconds: float
    flops: int


@dataclass(frozen=True)
class Costs:
    """What a run has cost: bytes of HTTP messages by kind, and of all messages; seconds of steps, floating-point
    operations, and the most bytes of memory."""

    traffic: dict[str, int] = field(default_factory=dict[str, int])
    sent: int = 0
    received: int = 0
    seconds: float = 0.0
    flops: int = 0
    memory: int = 0

    def __add__(self, other: Costs) -> Costs:
        """Of two processes, one after the other."""
        return Costs(
            dict(Counter(self.traffic) + Counter(other.traffic)), self.sent + other.sent,
            self.received + other.received, self.seconds + other.seconds, self.flops + other.flops,
            max(self.memory, other.memory),
        )  # fmt: skip


class GuardedTrainer:
    """Trains the ends of a split model on questions' right continuations; can stop after any step and go on later.

    Args:
        summary: what `blindtune.json` tells beside the trainer's own: model, cut, method, options. A run is resumed
            where its `fingerprint`, `cut` and `emulator` are the same.
        checkpoint: folder for checkpoints; none are written without it.
        meter: what this process has cost beside steps and their messages.
        key: 32 secret bytes that the noise of training messages follows from; from the operating system if left out.
    """

    def __init__(
        self,
        model: SplitCausalLM,
        ends: Ends,
        design: Design,
        train: Sequence[TokenizedQuestion],
        config: GuardedConfig,
        *,
        summary: dict[str, Any] | None = None,
        checkpoint: Path | None = None,
        save_every: int = 10,
        meter: Callable[[], Costs] = Costs,
        key: bytes | None = None,
    ) -> None:
        self.model, self.ends, self.design, self.config = model, ends, design, config
        self.train, self.summary = list(train), summary or {}
        self.checkpoint, self.save_every, self.meter = checkpoint, save_every, meter
        self.plan = BatchPlan([len(question.row) for question in train], config.batch_size, config.seed)
        self.optimizer = torch.optim.AdamW(ends.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
        self.done = 0
        self._earlier, self._steps = Costs(), Costs()
        """Of earlier processes, and of this one's steps but for their messages."""
        self._traffic = traffic_of(model)
        self._secret = SecureGenerator(key)
        self._flops_per_token = 0.0
        self._messages: int | None = None
        """Of the step that is under way; None between steps."""
        model.disturb, model.encode = self._disturb, design.encoder(model.bottom)

    def steps(self) -> Iterator[GuardedStep]:
        """Runs the remaining steps, one at each `next`. A step that fails changes no weight."""
        while self.done < self.config.steps:
            yield self._step()
            if self.checkpoint is not None and self.done % self.save_every == 0:
                self.save()

    @property
    def costs(self) -> Costs:
        """Of the run so far, in all processes that worked on it."""
        return self._earlier + self._steps + Costs(traffic=self._moved(self._traffic)) + self.meter()

    def batch(self, step: int) -> CausalBatch:
        """What step 0, 1, … is trained on."""
        chosen = [self.train[index] for index in self.plan.batch(step)]
        batch = CausalBatch.of([question.row for question in chosen], [question.start for question in chosen])
        return batch.to(self.model.device)

    def _step(self) -> GuardedStep:
        start, before = time.perf_counter(), traffic_of(self.model)
        self.optimizer.zero_grad()
        self._messages = 0
        batch = self.batch(self.done)
        try:
            with self._counting(batch):
                losses = self.design.step(self.model, self.ends, batch, self._generator())
        finally:
            self._messages = None
        if self.config.clip_gradients:
            torch.nn.utils.clip_grad_norm_(self.ends.parameters(), self.config.clip_gradients, error_if_nonfinite=True)
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.learning_rate * self.config.rate(self.done)
        self.optimizer.step()
        self.done += 1
        done = GuardedStep(self.done, losses, self._moved(before), time.perf_counter() - start, self._flops(batch))
        self._steps += Costs(seconds=done.seconds, flops=done.flops)
        return done

    def _moved(self, before: dict[str, int]) -> dict[str, int]:
        return {kind: count - before.get(kind, 0) for kind, count in traffic_of(self.model).items()}

    @contextmanager
    def _counting(self, batch: CausalBatch) -> Generator[None]:
        """Counts operations in some of the steps: counting takes time, and other kernels with other last bits.

        Which steps follows from their number alone, so a resumed run counts where an uninterrupted one does.
        """
        if self.done % COUNT_EVERY:
            yield
            return
        with FlopCounterMode(display=False, custom_mapping=ATTENTION_ON_CPU) as counter:
            yield
        self._flops_per_token = counter.get_total_flops() / batch.ids.numel()

    def _flops(self, batch: CausalBatch) -> int:
        return round(self._flops_per_token * batch.ids.numel())

    def _disturb(self, smashed: Tensor) -> Tensor:
        """Noise that is secret, and another one for each message. A step that is repeated sends what it sent before."""
        if self._messages is None:  # an evaluation
            return self.design.disturb(smashed, SecureGenerator())
        place = f"{self.done} {self._messages}".encode()
        self._messages += 1
        return self.design.disturb(smashed, self._secret.derive(b"noise", place))

    def _generator(self) -> torch.Generator:
        """A public stream of its own for every step, so that a resumed run draws what an uninterrupted one would."""
        digest = hashlib.sha256(f"{self.config.seed} step {self.done}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))

    def save(self) -> None:
        """Writes a checkpoint of the last complete step: the tuned ends, and what a resumed run needs."""
        if self.checkpoint is None:
            return
        self.ends.save(self.checkpoint, str(self.summary.get("base_model", "")))
        state = {f"weights.{name}": tensor for name, tensor in self.ends.tensors().items()}
        for name, parameter in self.ends.trainable.items():
            moments = self.optimizer.state.get(parameter, {})
            state |= {f"{key}.{name}": moments[key].cpu() for key in ("exp_avg", "exp_avg_sq") if key in moments}
        told = {
            **self._identity(),
            "done": str(self.done),
            "key": self._secret.key.hex(),
            "flops_per_token": str(self._flops_per_token),
            "costs": json.dumps(asdict(self.costs)),
        }
        write_tensors(self.checkpoint / STATE, state, told)
        summary = {**self.summary, "steps": self.done, "training": asdict(self.config)}
        replace_file(self.checkpoint / SUMMARY, (json.dumps(summary, indent=2) + "\n").encode())
        if isinstance(self.design, Gradfree) and self.design.store is not None:
            self.design.store.save()

    def resume(self) -> None:
        """Goes on from what `save` wrote.

        Raises:
            CheckpointError: there is none, or it comes from another run; the message tells what differs.
        """
        path = (self.checkpoint or Path()) / STATE
        try:
            state, metadata = read_tensors(path)
        except CheckpointError as error:
            raise CheckpointError(
                f"{path} can't be read: {error.message}", remedy="Start anew without --resume."
            ) from None
        wrong = [name for name, value in self._identity().items() if metadata.get(name) != value]
        if wrong:
            raise CheckpointError(
                f"The checkpoint comes from a run that differs in: {'; '.join(wrong)}.",
                remedy="Resume with the same options, files and server, or start anew without --resume.",
            )
        self.ends.copy(under("weights.", state), str(path))
        self.done = int(metadata["done"])
        self._secret = SecureGenerator(bytes.fromhex(metadata["key"]))
        self._flops_per_token = float(metadata["flops_per_token"])
        self._earlier = Costs(**json.loads(metadata["costs"]))
        for name, parameter in self.ends.trainable.items():
            if f"exp_avg.{name}" in state:
                self.optimizer.state[parameter] = {
                    "step": torch.tensor(float(self.done)),
                    "exp_avg": state[f"exp_avg.{name}"].clone().to(parameter.device),
                    "exp_avg_sq": state[f"exp_avg_sq.{name}"].clone().to(parameter.device),
                }

    def _identity(self) -> dict[str, str]:
        """Hashes of everything that decides what the steps do, by what users call it."""
        ends = self.ends
        parts = {
            "data": [(question.row, question.start) for question in self.train],
            "steps, batch size, rate or seed": sorted(asdict(self.config).items()),
            "method or its options": (self.design.name, sorted(asdict(cast(Any, self.design)).items())),
            "what of the ends is tuned": (ends.trained, ends.rank, ends.alpha, sorted(ends.trainable)),
            "model": self.summary.get("fingerprint"),
            "cut": self.summary.get("cut"),
            "emulator": self.summary.get("emulator"),
            "--start": ends.start,
        }
        return {name: hashlib.sha256(repr(part).encode()).hexdigest() for name, part in parts.items()}


class Scorer(Protocol):
    """Tells how likely texts are: a `SplitCausalLM`, or `Plugged` ends at the provider's."""

    def score(self, batch: CausalBatch) -> tuple[Tensor, Tensor]:
        """log p of each text's learned tokens together `(B,)`, and whether greedy decoding would write them `(B,)`."""
        ...


class Plugged:
    """Tuned ends around the real trunk, at the provider's."""

    def __init__(self, plugin: RemotePlugin) -> None:
        self.plugin = plugin

    def score(self, batch: CausalBatch) -> tuple[Tensor, Tensor]:
        """See `Scorer`."""
        return self.plugin.score(batch.rows(), batch.starts.tolist())


def traffic_of(model: SplitCausalLM) -> dict[str, int]:
    """Bytes of HTTP messages so far by kind; empty where the middle is here."""
    return dict(getattr(model.middle, "traffic", {}))


def evaluate_questions(
    model: Scorer, questions: Sequence[TokenizedQuestion], *, tokens: int = 2048
) -> Iterator[tuple[int, dict[str, float]]]:
    """Scores by likelihood, as the LM evaluation harness does.

    Args:
        tokens: in one pass.
    Yields:
        How many questions are done, and so far: `accuracy` (the likeliest continuation is right), `accuracy_norm` (the
        likeliest by character), `loss` of the right one's tokens; the last are the final ones.
    """
    right = normalised = 0
    loss, learned = 0.0, 0
    for number, question in enumerate(questions, 1):
        order = sorted(range(len(question.rows)), key=lambda i: len(question.rows[i]))
        scores = [0.0] * len(order)
        for part in _parts(order, [len(row) for row in question.rows], tokens):
            batch = CausalBatch.of([question.rows[i] for i in part], [question.starts[i] for i in part])
            with torch.no_grad():
                for index, value in zip(part, model.score(batch)[0].tolist(), strict=True):
                    scores[index] = value
        by_character = [score / max(1, n) for score, n in zip(scores, question.characters, strict=True)]
        right += scores.index(max(scores)) == question.answer
        normalised += by_character.index(max(by_character)) == question.answer
        loss -= scores[question.answer]
        learned += len(question.row) - question.start
        yield number, {"accuracy": right / number, "accuracy_norm": normalised / number, "loss": loss / learned}


def score_answers(
    model: Scorer, questions: Sequence[TokenizedQuestion], *, tokens: int = 2048
) -> Iterator[tuple[float, bool]]:
    """For each question: the mean loss of its right continuation's tokens, and whether greedy decoding would write it.

    Args:
        tokens: in one pass.
    """
    for part in _parts(list(range(len(questions))), [len(question.row) for question in questions], tokens):
        chosen = [questions[i] for i in part]
        batch = CausalBatch.of([question.row for question in chosen], [question.start for question in chosen])
        with torch.no_grad():
            likelihoods, greedy = model.score(batch)
        for question, value, by_heart in zip(chosen, likelihoods.tolist(), greedy.tolist(), strict=True):
            yield -value / (len(question.row) - question.start), bool(by_heart)


def _parts(order: list[int], lengths: list[int], tokens: int) -> list[list[int]]:
    """Indices in order, so many at a time that padded they have at most so many tokens."""
    parts: list[list[int]] = [[]]
    for index in order:
        longest = max([lengths[i] for i in parts[-1]], default=0)
        if parts[-1] and (len(parts[-1]) + 1) * max(longest, lengths[index]) > tokens:
            parts.append([])
        parts[-1].append(index)
    return parts
