"""`PrivateModel`: a backbone on somebody's servers, a head on ours, and a method that decides what they may learn."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import ClassVar, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from blindtune.client import Backbone, OperatorPool, RemoteBatch
from blindtune.errors import BadLabels, ConfigError
from blindtune.methods.head import LinearHead
from blindtune.models.tokenizer import Text, TokenRow
from blindtune.privacy.batches import BatchMonitor
from blindtune.privacy.history import EarlierRun, LabelHistory
from blindtune.privacy.ledger import Ledger, new_id
from blindtune.privacy.randomness import SecureGenerator

PROBE_TEXTS = 16
Loss = Callable[[Tensor, Tensor], Tensor]
_ATTACHING = Lock()
"""Models take backbones and methods one after the other."""


class Method(Protocol):
    """A training algorithm: what is sent, how adapters are mixed, what is added to the loss."""

    name: ClassVar[str]
    default_rank: ClassVar[int]
    """Of the adapters, where a user names none; α is twice the rank."""
    default_lr: ClassVar[float]
    """Learning rate of the adapters, where a user names none."""

    attached: bool
    """Whether it belongs to a model: what it counts and draws is that model's."""

    @property
    def num_adapters(self) -> int: ...
    @property
    def fixed_a(self) -> bool:
        """Whether adapters train B alone, over A matrices that follow from a public seed."""
        ...

    @property
    def ledger(self) -> Ledger | None:
        """Counts what operators are sent; None where nothing bounds what that tells."""
        ...

    @property
    def label_mu(self) -> float:
        """μ of one label in everything that operators may see of the run; infinite where nothing bounds it."""
        ...

    @property
    def watches_batches(self) -> bool:
        """Whether the method's guarantee needs batches that don't depend on labels."""
        ...

    @property
    def needs_frozen(self) -> bool:
        """Whether `penalties` wants frozen features."""
        ...

    def attach(self, backbone: Backbone, classes: int, generator: SecureGenerator) -> None:
        """Installs the gradient channel and draws what is secret."""
        ...

    def check(self, backbone: Backbone) -> None:
        """Raises `PrivacyError` or `ConfigError` if training over these operators would break the method's promise."""
        ...

    def prepare(self, frozen: Tensor, labels: Tensor) -> None:
        """Learns statistics from the training set's frozen features `(N, d)` and labels `(N,)`."""
        ...

    def mix(self, hidden: Tensor) -> Tensor:
        """What the head reads, `(B, d)`, from hidden states `(n, B, d)`."""
        ...

    def penalties(self, hidden: Tensor, frozen: Tensor | None, labels: Tensor) -> dict[str, Tensor]:
        """Named terms for the loss, from hidden states `(n, B, d)`, frozen features `(B, d)` and true labels `(B,)`."""
        ...

    def adapter_labels(self, rows: Sequence[TokenRow], labels: Tensor) -> Tensor:
        """The labels `(B,)` that adapters learn, and every head that sends them gradients; true ones, if nothing else.

        Called for every batch and for the whole training set: an example has the same label each time.
        """
        ...

    @property
    def auxiliary(self) -> nn.Module | None:
        """A head of the adapters' own, from `(B, d)` to `(B, K)`.

        With it, the head that predicts learns the true labels from detached features and sends adapters no gradient.
        """
        ...

    def report(self) -> dict[str, float]:
        """Numbers to show while training, such as μ of the gradient channel."""
        ...

    def state(self) -> dict[str, Tensor]:
        """Everything secret or learned, for a checkpoint. Tensors in it are never changed in place."""
        ...

    def snapshot(self) -> dict[str, Tensor]:
        """What a step changes, to undo it. What was sent stays in the ledger."""
        ...

    def load_state(self, state: dict[str, Tensor]) -> None: ...

    def probe(self, batch: RemoteBatch, pool: OperatorPool) -> dict[str, float]:
        """Measures what the defence costs in precision, on a few texts, and warns where that is much."""
        ...


@dataclass(frozen=True)
class Output:
    """Result of one pass: logits `(B, K)`; with labels also the loss and its parts."""

    logits: Tensor
    loss: Tensor | None = None
    parts: dict[str, float] = field(default_factory=dict[str, float])


class PrivateModel(nn.Module):
    """A hosted model with a local head, trained by a private method.

    Args:
        backbone: the operators' model; its adapters are replaced by as many as the method wants.
        head: any module from `(B, d)` to `(B, K)`.
        method: `P3EFT(...)`, or one to compare it with: any class of `blindtune.methods.METHODS`.
        loss: `(logits, labels) -> scalar`, a mean over the batch; cross entropy if left out.
        generator: secret randomness; from the operating system if left out.
        predict_only: skips the checks that only training needs: one operator is enough to predict.
        seed: of the adapters' public initial weights, and of dropout if the LoraConfig has any.
        ledger: folder of the ledger, where every message is written down before it is sent; the run's own folder. In
            memory until `save_pretrained`, if left out: then a crash forgets what was sent.
    Raises:
        PrivacyError: the operators given can't hold what the method promises.
        ConfigError: a method that belongs to another model.
    """

    def __init__(
        self,
        backbone: Backbone,
        head: nn.Module,
        method: Method,
        *,
        loss: Loss = F.cross_entropy,
        generator: SecureGenerator | None = None,
        seed: int = 0,
        predict_only: bool = False,
        ledger: str | Path | None = None,
    ) -> None:
        super().__init__()
        self.backbone, self.head, self.method, self.loss, self.seed = backbone, head, method, loss, seed
        self.generator = generator or SecureGenerator()
        self._monitor: BatchMonitor | None = None
        self.precision: dict[str, float] = {}
        """What `prepare` measured of the method's precision."""
        with torch.no_grad():
            self.classes = int(head(torch.zeros(1, backbone.hidden_size)).shape[-1])
        self.history = LabelHistory()
        self._run = new_id()
        with _ATTACHING:
            before = backbone.channel
            try:
                self._attach(predict_only, ledger)
            except BaseException:
                backbone.channel = before  # whose it was, it stays
                raise
            self._holds = (backbone.channel, backbone.adapters)
        self.auxiliary = method.auxiliary  # a submodule: its parameters are the optimizer's too

    def _attach(self, predict_only: bool, ledger: str | Path | None) -> None:
        """Gives the backbone to this model: its method's channel, and adapters of its own."""
        backbone, method = self.backbone, self.method
        if method.attached:
            raise ConfigError(
                f"This {type(method).__name__} belongs to another model, and counts what operators see of that.",
                remedy="Give each model a method of its own.",
            )
        method.attach(backbone, self.classes, self.generator)
        if not predict_only:
            method.check(backbone)
        if method.ledger is not None:
            method.ledger.follow(self.history.home)
            if ledger is not None:
                method.ledger.attach(ledger)
        public = torch.Generator().manual_seed(self.seed)
        a_seed = hashlib.sha256(b"blindtune A" + self.seed.to_bytes(8, "little", signed=True)).hexdigest()
        backbone.set_adapters(method.num_adapters, generator=public, a_seed=a_seed if method.fixed_a else None)
        method.attached = True

    def check_backbone(self) -> None:
        """Raises `ConfigError` if another model uses the backbone now: messages would count there."""
        channel, adapters = self._holds
        if self.backbone.channel is not channel or self.backbone.adapters is not adapters:
            raise ConfigError(
                "The backbone belongs to another model now.", remedy="Give each model a Backbone of its own."
            )

    @property
    def run(self) -> str:
        """The name of the run, in the history of this machine."""
        return self._run if self.method.ledger is None else self.method.ledger.run

    @property
    def ledger_run(self) -> str:
        """The name of the run in its ledger; empty where there is none."""
        return "" if self.method.ledger is None else self.method.ledger.run

    def prepare(
        self,
        texts: Sequence[Text] | Sequence[TokenRow],
        labels: Sequence[int] | Tensor,
        *,
        watch_batches: bool = True,
    ) -> None:
        """Fetches the frozen features of the training texts and starts the head and the method from them.

        Each text goes to one operator once; labels stay here. A `LinearHead` is fitted on the frozen features (linear
        probing, then fine-tuning); other heads keep their initial weights. The run is registered among those on the
        same labels (`blindtune.privacy.history`).

        Args:
            watch_batches: whether the batches to come are watched, where the method's guarantee needs ones that don't
                depend on labels. False for batches that are known not to.
        """
        self.check_backbone()
        target = self._labels(labels)
        self.register(texts)
        rows = self.backbone.rows(texts)
        features = self.backbone.frozen(rows)
        self.method.prepare(features, target)
        if watch_batches and self.method.watches_batches:
            self._monitor = BatchMonitor([row.ids for row in rows], target.tolist())
        self._probe(rows)
        shown = self.method.adapter_labels(rows, target)
        count = max(1, self.method.num_adapters)
        with torch.no_grad():
            mixed = self.method.mix(features.unsqueeze(0).expand(count, -1, -1))
        if isinstance(self.auxiliary, LinearHead):
            self.auxiliary.fit(mixed, shown)
        if isinstance(self.head, LinearHead):
            self.head.fit(mixed, shown if self.auxiliary is None else target)

    def forward(
        self, texts: Sequence[Text] | Sequence[TokenRow], labels: Sequence[int] | Tensor | None = None
    ) -> Output:
        """Logits for texts; with labels also the loss that `backward()` can be called on.

        Raises:
            LabelDependentBatches: the batches of a training loop depend on labels, and the method's guarantee needs
                ones that don't. Known after `prepare` alone.
        """
        self.check_backbone()
        target = None if labels is None else self._labels(labels)
        rows = self.backbone.rows(texts)
        if self._monitor is not None and target is not None and self.training and torch.is_grad_enabled():
            self._monitor.observe([row.ids for row in rows], target.tolist())
        dropout = self.backbone.adapter_config.lora_dropout > 0 and self.training and labels is not None
        seed = self.seed * 2**32 + self.backbone.steps if dropout else None
        hidden = self.backbone.all_adapters(rows, seed=seed)  # (n, B, d)
        mixed = self.method.mix(hidden)
        logits = self.head(mixed if self.auxiliary is None else mixed.detach())
        if target is None:
            return Output(logits)
        frozen = self.backbone.frozen(rows) if self.method.needs_frozen else None
        shown = self.method.adapter_labels(rows, target)  # while evaluating too: that loss has a gradient as well
        task = self.loss(logits, shown if self.auxiliary is None else target)
        penalties = self.method.penalties(hidden, frozen, target) if self.training else {}
        if self.auxiliary is not None and self.training:
            penalties["auxiliary"] = self.loss(self.auxiliary(mixed), shown)
        total = torch.stack([task, *penalties.values()]).sum()
        parts = {name: float(value.detach()) for name, value in {"task": task, **penalties}.items()}
        return Output(logits, total, parts)

    def save_pretrained(self, folder: str | Path, *, classes: list[str] | None = None) -> None:
        """Writes PEFT adapters, the head and the run's secrets; `blindtune.load_model` reads them again."""
        from blindtune.methods.checkpoint import save_model  # which knows every method, and so this module

        save_model(self, folder, classes=classes)

    def earlier_runs(self, texts: Sequence[Text]) -> list[EarlierRun]:
        """Other runs of this machine that have used labels of these texts."""
        return self.history.earlier(texts, but=self.run)

    def register(self, texts: Sequence[Text] | Sequence[TokenRow]) -> None:
        """Notes in the history of this machine that the run uses labels of these texts."""
        if self.method.label_mu > 0:
            named = [repr(text.ids) if isinstance(text, TokenRow) else text for text in texts]
            self.history.register(self.run, self.method.label_mu, named)

    def _probe(self, rows: Sequence[TokenRow]) -> None:
        """On a few texts in a random order: nothing about labels decides which."""
        if not self.method.num_adapters or not rows:
            return
        order = self.generator.derive(b"texts of the probe").permutation(len(rows))[:PROBE_TEXTS]
        operators = self.backbone.channel.choose(len(self.backbone.pool), 0)
        batch = self.backbone.batch([rows[index] for index in order], operators, None)
        self.precision = self.method.probe(batch, self.backbone.pool)

    def _labels(self, labels: Sequence[int] | Tensor) -> Tensor:
        target = torch.as_tensor(labels)
        if target.dtype.is_floating_point or target.dtype == torch.bool or target.ndim != 1:
            raise BadLabels(
                f"Labels have dtype {target.dtype} and shape {tuple(target.shape)}.",
                remedy="Give one integer class index for each example.",
            )
        if len(target) and not (int(target.min()) >= 0 and int(target.max()) < self.classes):
            raise BadLabels(
                f"Labels reach from {int(target.min())} to {int(target.max())}; the head has {self.classes} classes.",
                remedy="Number the classes from 0, or make the head larger.",
            )
        return target.long()
