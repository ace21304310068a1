"""The training loop of the command line: steps, checkpoints, resume. Users' own loops need none of it."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from blindtune.errors import CheckpointError, ConfigError
from blindtune.methods import PrivateModel, save_model
from blindtune.models.tokenizer import Text, TokenRow
from blindtune.training.batches import BatchPlan, linear_rate
from blindtune.training.data import Examples
from blindtune.training.metrics import scores
from blindtune.training.moments import randomise_moments


@dataclass(frozen=True)
class TrainConfig:
    """How long and how fast to train. Learning rates warm up linearly, then fall linearly to `floor`."""

    steps: int = 150
    batch_size: int = 32
    learning_rate: float = 3e-3
    head_learning_rate: float = 2e-3
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.99)
    warmup: int = 10
    floor: float = 0.03
    random_moments: float = 0.0
    """Size of secret random moments that the adapters' Adam starts from, in units of gradients; none if 0. See
    `blindtune.training.randomise_moments`, which does the same for an optimizer of your own."""
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.random_moments < math.inf:
            raise ConfigError(f"random_moments = {self.random_moments} is no size.", remedy="Use 0 or a small number.")
        if min(self.steps, self.batch_size) < 1 or min(self.learning_rate, self.head_learning_rate) <= 0:
            raise ConfigError(
                f"{self.steps} steps of {self.batch_size} at rates {self.learning_rate}, {self.head_learning_rate}.",
                remedy="Use at least one step, one example and positive learning rates.",
            )

    def rate(self, step: int) -> float:
        """The factor on the learning rates at step 0, 1, …"""
        return linear_rate(step, self.steps, self.warmup, self.floor)


@dataclass(frozen=True)
class Step:
    """What one step did: losses by name, accuracy on its batch, body bytes, seconds, and the method's own numbers."""

    step: int
    losses: dict[str, float]
    accuracy: float
    bytes_sent: int
    bytes_received: int
    seconds: float
    report: dict[str, float] = field(default_factory=dict[str, float])


class Trainer:
    """Trains a `PrivateModel` on labelled examples; can stop after any step and go on later.

    Args:
        checkpoint: folder for checkpoints; none are written without it.
        save_every: steps between checkpoints.
    """

    def __init__(
        self,
        model: PrivateModel,
        train: Examples,
        config: TrainConfig,
        *,
        checkpoint: Path | None = None,
        save_every: int = 10,
    ) -> None:
        self.model, self.train, self.config = model, train, config
        self.checkpoint, self.save_every = checkpoint, save_every
        self.rows = model.backbone.rows(train.texts)
        self.labels = torch.tensor(train.labels)
        self.plan = BatchPlan([len(row) for row in self.rows], config.batch_size, config.seed)
        local = [p for name, p in model.named_parameters() if not name.startswith("backbone.")]  # the head, or two
        groups = [
            {"params": list(model.backbone.parameters()), "lr": config.learning_rate},
            {"params": local, "lr": config.head_learning_rate},
        ]
        self._base = [config.learning_rate, config.head_learning_rate]
        self.optimizer = torch.optim.AdamW(groups, betas=config.betas, weight_decay=config.weight_decay)
        if config.random_moments > 0:
            generator = model.generator.derive(b"moments")
            randomise_moments(self.optimizer, model.backbone.parameters(), config.random_moments, generator)
        self.done = 0
        if checkpoint is not None and model.method.ledger is not None:
            model.method.ledger.attach(checkpoint)

    def prepare(self) -> None:
        """Frozen features, the head's start, the method's statistics. Not needed when resuming."""
        self.model.prepare(self.train.texts, self.labels, watch_batches=False)  # a public seed shuffles them

    def steps(self) -> Iterator[Step]:
        """Runs the remaining steps, one at each `next`. A step that fails changes nothing that a checkpoint holds."""
        self.model.train()
        while self.done < self.config.steps:
            method, sent = self.model.method.snapshot(), self.model.backbone.steps
            try:
                step = self._step()
            except BaseException:  # nothing of it stays but what the ledger has
                self.model.method.load_state(method)
                self.model.backbone.steps = sent
                raise
            yield step
            if self.checkpoint is not None and self.done % self.save_every == 0:
                self.save()
        self.model.eval()

    def _step(self) -> Step:
        start, before = time.perf_counter(), self.model.backbone.traffic
        indices = self.plan.batch(self.done)
        for group, base in zip(self.optimizer.param_groups, self._base, strict=True):
            group["lr"] = base * self.config.rate(self.done)
        output = self.model([self.rows[i] for i in indices], self.labels[indices])
        assert output.loss is not None  # noqa: S101 - labels were given
        self.optimizer.zero_grad()
        output.loss.backward()
        if all(p.grad is None or bool(torch.isfinite(p.grad).all()) for p in self.model.parameters()):
            self.optimizer.step()  # else the step is lost; where that must not show, it was sent like any other
        self.done += 1
        after = self.model.backbone.traffic
        return Step(
            self.done,
            output.parts,
            float((output.logits.detach().argmax(-1) == self.labels[indices]).float().mean()),
            after.sent - before.sent,
            after.received - before.received,
            time.perf_counter() - start,
            self.model.method.report(),
        )

    def save(self) -> None:
        """Writes a checkpoint of the last complete step."""
        if self.checkpoint is not None:
            save_model(self.model, self.checkpoint, classes=self.train.classes, resume=self._resume_state())

    def load(self, method: dict[str, Tensor], state: dict[str, Tensor]) -> None:
        """Goes on from what `save` wrote; the model must have been loaded from the same checkpoint.

        Raises:
            CheckpointError: the run had other data, another seed, batch size or schedule.
        """
        self.model.check_backbone()
        wanted = self._identity()
        if not torch.equal(state["identity"], wanted):
            raise CheckpointError(
                "The checkpoint comes from a run with other data, seed, batch size, steps or learning rates.",
                remedy="Resume with the same options and file, or start anew without --resume.",
            )
        self.model.register(self.train.texts)
        self.model.method.load_state({**self.model.method.state(), **method})
        with torch.no_grad():  # from the one file that was written at once
            for name, parameter in self.model.named_parameters():
                parameter.copy_(state[f"parameter.{name}"])
        if self.model.method.needs_frozen:  # all at once, as at the start: batches of other shape round differently
            self.model.backbone.frozen(self.rows)
        self.done, self.model.backbone.steps = int(state["done"]), int(state["backbone_steps"])
        for index, parameter in enumerate(_parameters(self.optimizer)):
            if f"exp_avg.{index}" in state:
                self.optimizer.state[parameter] = {
                    "step": torch.tensor(float(self.done)),
                    "exp_avg": state[f"exp_avg.{index}"].clone(),
                    "exp_avg_sq": state[f"exp_avg_sq.{index}"].clone(),
                }

    def _resume_state(self) -> dict[str, Tensor]:
        state = {"done": torch.tensor(self.done), "backbone_steps": torch.tensor(self.model.backbone.steps)}
        state |= {f"parameter.{name}": parameter for name, parameter in self.model.named_parameters()}
        for index, parameter in enumerate(_parameters(self.optimizer)):
            moments = self.optimizer.state.get(parameter, {})
            if moments:
                state[f"exp_avg.{index}"] = moments["exp_avg"]
                state[f"exp_avg_sq.{index}"] = moments["exp_avg_sq"]
        return {**state, "identity": self._identity()}

    def _identity(self) -> Tensor:
        """A hash of everything that decides what the steps do."""
        text = repr((sorted(asdict(self.config).items()), [row.ids for row in self.rows], self.labels.tolist()))
        return torch.frombuffer(bytearray(hashlib.sha256(text.encode()).digest()), dtype=torch.uint8)


def predict(model: PrivateModel, texts: Sequence[Text] | Sequence[TokenRow]) -> Tensor:
    """Class probabilities `(N, K)`, over all operators at once. `model.backbone.on_infer` tells progress."""
    model.check_backbone()
    model.eval()
    with torch.no_grad():
        return model.head(model.method.mix(model.backbone.infer(texts))).softmax(-1)


def evaluate(model: PrivateModel, examples: Examples) -> dict[str, float]:
    """Accuracy, macro F1 and loss on labelled examples."""
    return scores(predict(model, examples.texts), torch.tensor(examples.labels))


def steps_for(examples: int, batch_size: int, epochs: float) -> int:
    """Steps that so many epochs take, at least one."""
    return max(1, math.ceil(epochs * math.ceil(examples / batch_size)))


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
