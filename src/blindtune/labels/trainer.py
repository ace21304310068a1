"""Trains a `PrivateModel` on labelled examples, and evaluates the result."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from blindtune import training
from blindtune.data import BatchPlan, Examples
from blindtune.errors import ConfigError
from blindtune.files import under
from blindtune.labels.adam_moments import randomise_adam_moments
from blindtune.labels.checkpoint import check_run
from blindtune.labels.losses import loss_name
from blindtune.labels.metrics import scores
from blindtune.labels.model import PrivateModel
from blindtune.models.tokenizer import Text, TokenRow

AT_ONCE = 256
"""Number of texts whose frozen states a head without adapters reads at once."""


@dataclass(frozen=True)
class TrainConfig(training.TrainConfig):
    """Options for training a `PrivateModel`.

    Args:
        head_learning_rate: maximum learning rate of the head.
        random_adam_moments: size of the secret random Adam moments that the adapters' optimizer starts from, in units
            of gradients; 0 for none. `blindtune.randomise_adam_moments` does the same for an optimizer of your own.
    Raises:
        ConfigError: a value is out of range.
    """

    betas: tuple[float, float] = (0.9, 0.99)
    head_learning_rate: float = 2e-3
    random_adam_moments: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.random_adam_moments < math.inf:
            raise ConfigError(
                f"random_adam_moments = {self.random_adam_moments} must be 0 or positive and finite.",
                remedy="Use 0 for none, or the size of typical gradients.",
            )
        if not self.head_learning_rate > 0:
            raise ConfigError(
                f"head_learning_rate = {self.head_learning_rate} isn't positive.", remedy="Use a positive number."
            )


@dataclass(frozen=True)
class Step:
    """Result of one training step.

    Attributes:
        step: number of the step, from 1.
        losses: terms of the loss by name.
        accuracy: accuracy on the step's batch, before the update.
        bytes_sent, bytes_received: bytes of HTTP messages in the step.
        seconds: duration of the step.
        report: numbers that the method reports (`Method.report`).
    """

    step: int
    losses: dict[str, float]
    accuracy: float
    bytes_sent: int
    bytes_received: int
    seconds: float
    report: dict[str, float] = field(default_factory=dict[str, float])


class Trainer(training.Trainer[TrainConfig, Step]):
    """Trains a `PrivateModel` on labelled examples. It can stop after any step and resume later.

    Args:
        checkpoint: folder for checkpoints. Without it, none are written.
        save_every: number of steps between checkpoints.
    Raises:
        ConfigError: clipping would tell adapters that learn other labels about the true ones.
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
        if config.max_grad_norm and model.auxiliary is not None:
            raise ConfigError(
                f"{model.method.name} trains its adapters on other labels than its head. Clipping by a norm over both "
                "gradients would make the adapters depend on the true labels.",
                remedy="Use max_grad_norm=0.",
            )
        parameters = dict(model.named_parameters())
        rates = {name: config.head_learning_rate for name in parameters if not name.startswith("backbone.")}
        super().__init__(config, parameters, rates=rates, checkpoint=checkpoint, save_every=save_every)
        self.model, self.train = model, train
        self.rows = model.backbone.rows(train.texts)
        self.labels = torch.tensor(train.labels)
        self.plan = BatchPlan([len(row) for row in self.rows], config.batch_size, config.seed)
        if config.random_adam_moments > 0:
            generator = model.generator.derive(b"moments")
            randomise_adam_moments(self.optimizer, model.backbone.parameters(), config.random_adam_moments, generator)
        if checkpoint is not None and model.method.ledger is not None:
            model.method.ledger.attach(checkpoint)

    def prepare(self) -> None:
        """Prepares the model with the training set (`PrivateModel.prepare`). It isn't needed when resuming."""
        # the batches follow from a public seed, so they don't depend on labels
        self.model.prepare(self.train.texts, self.labels, watch_batches=False)

    def steps(self) -> Iterator[Step]:
        self.model.train()
        yield from super().steps()
        self.model.eval()

    def _step(self) -> Step:
        state, backbone_steps = self.model.method.step_state_dict(), self.model.backbone.steps
        try:
            return self._trained_step()
        except BaseException:  # undo the step, except for the ledger: messages that were sent still count
            if state:
                self.model.method.load_state_dict(state)
            self.model.backbone.steps = backbone_steps
            raise

    def _trained_step(self) -> Step:
        start, before = time.perf_counter(), self.model.backbone.traffic
        indices = self.plan.batch(self.done)
        labels = self.labels[indices]
        output = self.model([self.rows[i] for i in indices], labels)
        self.optimizer.zero_grad()
        output.backward()
        if all(p.grad is None or bool(torch.isfinite(p.grad).all()) for p in self.model.parameters()):
            self._update()  # otherwise the step is skipped; padded LoRA sent the same messages as in any other step
        self.done += 1
        after = self.model.backbone.traffic
        return Step(
            self.done,
            output.parts,
            float((output.logits.detach().argmax(-1) == labels).float().mean()),
            after.sent - before.sent,
            after.received - before.received,
            time.perf_counter() - start,
            self.model.method.report(),
        )

    def _identity(self) -> dict[str, object]:
        return {
            "data": ([row.ids for row in self.rows], self.labels.tolist()),
            "steps, batch size, rates or seed": sorted(asdict(self.config).items()),
            "loss": loss_name(self.model.loss),
        }

    def _state(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        self.model.check_backbone()  # before anything is written
        state = self.model.method.state_dict()
        texts = {"backbone_steps": str(self.model.backbone.steps), "run": self.model.ledger_run}
        return {f"method.{name}": tensor for name, tensor in state.items()}, texts

    def _load_state(self, tensors: dict[str, Tensor], texts: dict[str, str]) -> None:
        self.model.check_backbone()
        check_run(self.checkpoint, self.model.ledger_run, texts.get("run"))
        self.model.register(self.train.texts)
        state = {**self.model.method.state_dict(), **under("method.", tensors)}
        if state:
            self.model.method.load_state_dict(state)
        if self.model.method.needs_frozen:
            # compute all features at once, as `prepare` does: batches of another shape would round differently
            self.model.backbone.frozen(self.rows)
        self.model.backbone.steps = int(texts["backbone_steps"])

    def _save_result(self, folder: Path) -> None:
        self.model.save_pretrained(folder, classes=self.train.classes)


def predict(model: PrivateModel, texts: Sequence[Text] | Sequence[TokenRow]) -> Tensor:
    """Computes class probabilities `(N, K)` on all operators at once. `model.backbone.on_infer` reports progress."""
    model.check_backbone()
    model.eval()
    backbone, method = model.backbone, model.method
    rows = backbone.rows(texts)
    with torch.no_grad():
        if method.num_adapters:
            return model.head(method.mix(backbone.infer(rows))).softmax(-1)
        method.fetch(backbone, rows)
        chunks = [rows[start : start + AT_ONCE] for start in range(0, len(rows), AT_ONCE)]
        with backbone.offline():
            logits = [model.head(method.mix(method.inputs(backbone, chunk).unsqueeze(0))) for chunk in chunks]
        return torch.cat(logits).softmax(-1) if logits else torch.empty(0, model.classes)


def evaluate(model: PrivateModel, examples: Examples) -> dict[str, float]:
    """Computes `accuracy`, macro `f1` and `loss` (in nats) on labelled examples."""
    return scores(predict(model, examples.texts), torch.tensor(examples.labels))
