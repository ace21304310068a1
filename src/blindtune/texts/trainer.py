"""Trains the ends of a cut model on private texts, and measures the costs."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from blindtune import training
from blindtune.data import BatchPlan
from blindtune.data.questions import TokenizedQuestion
from blindtune.privacy.randomness import SecureGenerator
from blindtune.texts.costs import ATTENTION_ON_CPU, Costs
from blindtune.texts.designs import Design, design_options
from blindtune.texts.ends import Ends
from blindtune.texts.model import CausalBatch, CutCausalLM
from blindtune.training.summary import TextsSummary, write_summary

COUNT_EVERY = 25
"""Number of steps between those in which floating-point operations are counted."""


@dataclass(frozen=True)
class TrainConfig(training.TrainConfig):
    """Options for training the ends."""

    batch_size: int = 16
    learning_rate: float = 1e-3
    max_grad_norm: float = 1.0


@dataclass(frozen=True)
class Step:
    """Result of one training step.

    Operations are those of matrix products and attention, forward and backward; a multiplication and its sum count as
    two. They are counted in every 25th step, and estimated in the others from the number of tokens, padding included.

    Attributes:
        step: number of the step, from 1.
        losses: terms of the loss by name.
        traffic: bytes of the trunk's HTTP messages by kind.
        seconds: duration of the step.
        flops: floating-point operations in this process.
    """

    step: int
    losses: dict[str, float]
    traffic: dict[str, int]
    seconds: float
    flops: int


class Trainer(training.Trainer[TrainConfig, Step]):
    """Trains the ends of a cut model on questions' right continuations. It can stop after any step and resume later.

    Args:
        summary: content of the run's `blindtune.json`, needed for checkpoints. A run can be resumed only with the same
            fingerprint of the model, cut and emulator.
        checkpoint: folder for checkpoints. Without it, none are written.
        save_every: number of steps between checkpoints.
        meter: function that returns this process's costs besides those of steps and their messages.
    """

    def __init__(
        self,
        model: CutCausalLM,
        ends: Ends,
        design: Design,
        train: Sequence[TokenizedQuestion],
        config: TrainConfig,
        *,
        summary: TextsSummary | None = None,
        checkpoint: Path | None = None,
        save_every: int = 10,
        meter: Callable[[], Costs] = Costs,
    ) -> None:
        super().__init__(config, ends.trainable, checkpoint=checkpoint, save_every=save_every)
        self.model, self.ends, self.design = model, ends, design
        self.train, self.summary, self.meter = list(train), summary, meter
        self.plan = BatchPlan([len(question.row) for question in train], config.batch_size, config.seed)
        self._earlier, self._steps = Costs(), Costs()
        """Costs of earlier processes, and of this process's steps without their messages."""
        self._traffic = self._traffic_so_far()
        self._flops_per_token = 0.0

    @property
    def costs(self) -> Costs:
        """Costs of the run so far, in all processes that worked on it."""
        return self._earlier + self._steps + Costs(traffic=self._traffic_since(self._traffic)) + self.meter()

    def batch(self, step: int) -> CausalBatch:
        """Returns the batch of a step, numbered from 0."""
        chosen = [self.train[index] for index in self.plan.batch(step)]
        batch = CausalBatch.of([question.row for question in chosen], [question.start for question in chosen])
        return batch.to(self.model.device)

    def _step(self) -> Step:
        start, before = time.perf_counter(), self._traffic_so_far()
        self.optimizer.zero_grad()
        batch = self.batch(self.done)
        with self.model.boundary.training_step(self.done), self._counting(batch):
            losses = self.design.step(self.model, self.ends, batch, self._generator())
        self._update()
        self.done += 1
        flops = round(self._flops_per_token * batch.ids.numel())
        step = Step(self.done, losses, self._traffic_since(before), time.perf_counter() - start, flops)
        self._steps += Costs(seconds=step.seconds, flops=step.flops)
        return step

    def _clip(self, parameters: Sequence[torch.nn.Parameter], norm: float) -> None:
        torch.nn.utils.clip_grad_norm_(parameters, norm, error_if_nonfinite=True)

    def _traffic_so_far(self) -> dict[str, int]:
        return dict(self.model.boundary.trunk.traffic)

    def _traffic_since(self, before: dict[str, int]) -> dict[str, int]:
        return {kind: count - before.get(kind, 0) for kind, count in self._traffic_so_far().items()}

    @contextmanager
    def _counting(self, batch: CausalBatch) -> Generator[None]:
        """Counts operations in every `COUNT_EVERY`th step only, since counting takes time, and uses other kernels,
        whose results differ in the last bits.

        The number of a step decides whether it is counted, so a resumed run counts the same steps as an uninterrupted
        one.
        """
        if self.done % COUNT_EVERY:
            yield
            return
        with FlopCounterMode(display=False, custom_mapping=ATTENTION_ON_CPU) as counter:
            yield
        self._flops_per_token = counter.get_total_flops() / batch.ids.numel()

    def _generator(self) -> torch.Generator:
        """Returns a public generator for this step, so that a resumed run draws the same as an uninterrupted one."""
        digest = hashlib.sha256(f"{self.config.seed} step {self.done}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))

    def _identity(self) -> dict[str, object]:
        ends, summary = self.ends, self.summary
        return {
            "data": [(question.row, question.start) for question in self.train],
            "steps, batch size, rate or seed": sorted(asdict(self.config).items()),
            "design or its options": (self.design.name, sorted(design_options(self.design).items())),
            "what of the ends is tuned": (ends.tune, ends.rank, ends.alpha, sorted(ends.trainable)),
            "model": summary and summary.fingerprint,
            "cut": summary and summary.cut,
            "emulator": summary and summary.emulator,
            "--start": ends.start,
        }

    def _state(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        return {}, {
            "key": self.model.boundary.secret.key.hex(),
            "flops_per_token": str(self._flops_per_token),
            "costs": json.dumps(asdict(self.costs)),
        }

    def _load_state(self, tensors: dict[str, Tensor], texts: dict[str, str]) -> None:
        self.model.boundary.secret = SecureGenerator(bytes.fromhex(texts["key"]))
        self._flops_per_token = float(texts["flops_per_token"])
        self._earlier = Costs(**json.loads(texts["costs"]))

    def _load_parameters(self, saved: dict[str, Tensor], path: Path) -> None:
        self.ends.copy(saved, str(path))

    def _save_result(self, folder: Path) -> None:
        if self.summary is None:
            raise ValueError("a checkpoint needs a summary")
        self.ends.save(folder, self.summary.base_model_name)
        training_options = asdict(self.config)
        write_summary(folder, self.summary.model_copy(update={"steps": self.done, "training": training_options}))
        if self.model.boundary.store is not None:
            self.model.boundary.store.save()
