"""`PrivateModel`: a backbone on the operators' servers, a local head, and a method that protects the labels."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from blindtune.client import Backbone
from blindtune.errors import BadLabels, ConfigError
from blindtune.labels.checkpoint import (
    adapter_folders,
    check_fingerprint,
    check_readout_of,
    check_run,
    load_head,
    load_secret,
    remove_resume_of_another_run,
    save_adapters,
    save_head,
    save_secret,
)
from blindtune.labels.classifiers import Choice
from blindtune.labels.head import Head, LinearHead
from blindtune.labels.losses import LOSSES, Loss, loss_name
from blindtune.labels.methods.base import Method, make_method, options_of
from blindtune.models.tokenizer import Text, TokenRow
from blindtune.privacy.accountant import Guarantee, gaussian_guarantee
from blindtune.privacy.batches import BatchMonitor
from blindtune.privacy.history import EarlierRun, LabelHistory, total_mu
from blindtune.privacy.journal import JOURNAL, read_journal_of
from blindtune.privacy.ledger import new_id
from blindtune.privacy.randomness import SecureGenerator
from blindtune.training.summary import LabelsSummary, read_summary, write_summary

PROBE_TEXTS = 16
"""Number of training texts on which `prepare` measures the method's precision."""
_ATTACHING = Lock()
"""Lock held while a model attaches its method to a backbone, so that two models can't do it at the same time."""


@dataclass(frozen=True)
class Output:
    """Result of a forward pass.

    Attributes:
        logits: `(B, K)`.
        loss: scalar, the sum of all terms; None for a pass without labels.
        parts: value of each term of the loss, by name.
    """

    logits: Tensor
    loss: Tensor | None = None
    parts: dict[str, float] = field(default_factory=dict[str, float])

    def backward(self) -> None:
        """Computes the gradients of the model's parameters. Raises `ValueError` for a pass without labels."""
        if self.loss is None:
            raise ValueError("the pass had no labels, so it has no loss")
        self.loss.backward()


class PrivateModel(nn.Module):
    """A hosted model with a local head, trained by a private method.

    Args:
        backbone: the hosted model. Its adapters are replaced by new ones, as many as the method needs.
        head: any module from `(B, k · d)` to `(B, K)`, such as `LinearHead`. Methods that aren't trained in
            steps replace a `Head` by the one that they fit.
        method: `PaddedLoRA(...)`, or another method for comparison: any class of `blindtune.labels.methods.METHODS`.
        loss: `(logits, labels) -> scalar`, a mean over the batch, such as `squared_error`. Default: cross entropy.
        generator: secret random generator. Default: seeded by the operating system.
        seed: seed of the adapters' public initial weights, and of dropout if the `LoraConfig` has any.
        predict_only: skips the checks that only training needs. One operator is enough to predict.
        ledger: folder of the ledger, the run's own folder. Each message is recorded there before it is sent. Default:
            in memory until `save_pretrained`, so that a crash loses the record of what was sent.
    Raises:
        PrivacyError: with these operators the method can't keep its guarantee.
        ConfigError: the method belongs to another model, or it can't train this head.
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
        """Errors that the method adds to what the head reads, by name (`Method.probe`). Measured by `prepare`."""
        if isinstance(head, LinearHead) and method.mixes_equal_to_zero:
            raise ConfigError(
                "A LinearHead is fitted on frozen features, which this method mixes into zeros: nothing could train.",
                remedy="Use a head with random initial weights (--head mlp), or centre=true.",
            )
        self.classes = _classes(head, backbone.hidden_size)
        self.history = LabelHistory()
        self.choice: Choice | None = None
        """The head that the method chose in `prepare`, and what it chose from; None if the method chooses none."""
        self._run = new_id()
        with _ATTACHING:
            before = backbone.channel
            try:
                self._attach(predict_only, ledger)
            except BaseException:
                backbone.channel = before  # the backbone still belongs to its previous model
                raise
            self._holds = (backbone.channel, backbone.adapters)
        self.auxiliary = method.auxiliary  # as a submodule, so that the optimizer gets its parameters too

    def _attach(self, predict_only: bool, ledger: str | Path | None) -> None:
        """Installs the method's channel and new adapters in the backbone, which then belongs to this model."""
        backbone, method = self.backbone, self.method
        if method.attached:
            raise ConfigError(
                f"This {type(method).__name__} belongs to another model, whose messages to operators it counts.",
                remedy="Create a new method for each model.",
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
        """Raises `ConfigError` if another model uses the backbone now, since it would count this model's messages."""
        channel, adapters = self._holds
        if self.backbone.channel is not channel or self.backbone.adapters is not adapters:
            raise ConfigError(
                "The backbone belongs to another model now.", remedy="Create a new Backbone for each model."
            )

    @property
    def run(self) -> str:
        """Id of the run in this machine's history."""
        return self._run if self.method.ledger is None else self.method.ledger.run

    @property
    def ledger_run(self) -> str:
        """Id of the run in its ledger; empty if the method has no ledger."""
        return "" if self.method.ledger is None else self.method.ledger.run

    def fetch(self, texts: Sequence[Text] | Sequence[TokenRow]) -> None:
        """Fetches what the frozen model computes of these texts, so that nothing is sent for them later.

        The order in which they are sent doesn't depend on their order. With a method without adapters, call it once
        with all training and validation texts before `prepare`: then nothing is sent after labels were used.
        """
        self.check_backbone()
        self.method.fetch(self.backbone, self.backbone.rows(texts))

    def prepare(
        self,
        texts: Sequence[Text] | Sequence[TokenRow],
        labels: Sequence[int] | Tensor,
        *,
        watch_batches: bool = True,
    ) -> None:
        """Fetches the frozen features of the training texts, and initialises the head and the method with them.

        Each text is sent to one operator once; labels aren't sent. Nothing is sent after labels were used, so call
        `fetch` with validation texts before, if the method trains no adapters. A `Head` is fitted on the frozen
        features (linear probing, then fine-tuning); other modules keep their initial weights. The run is recorded in
        the history of runs that use these labels (`blindtune.privacy.history`).

        Args:
            watch_batches: whether later batches are checked, if the method's guarantee requires that batches don't
                depend on labels. Use False if they are known not to.
        """
        self.check_backbone()
        target = self._labels(labels)
        self.register(texts)
        rows = self.backbone.rows(texts)
        if not self.method.by_steps and isinstance(self.head, Head):
            self.fetch(rows)
            with self.backbone.offline():
                self.choice = self.method.fit_head(self.backbone, rows, target, self.classes)
            if self.choice is not None:
                self.head = self.choice.head
            return
        features = self.method.inputs(self.backbone, rows)
        self.method.prepare(features, target)
        if watch_batches and self.method.watches_batches:
            self._monitor = BatchMonitor([row.ids for row in rows], target.tolist())
        self._probe(rows)
        adapter_labels = self.method.adapter_labels(rows, target)
        count = max(1, self.method.num_adapters)
        with torch.no_grad():
            mixed = self.method.mix(features.expand(count, *features.shape))
        if isinstance(self.auxiliary, Head):
            self.auxiliary.fit(mixed, adapter_labels)
        if isinstance(self.head, Head):
            self.head.fit(mixed, adapter_labels if self.auxiliary is None else target)

    def forward(
        self, texts: Sequence[Text] | Sequence[TokenRow], labels: Sequence[int] | Tensor | None = None
    ) -> Output:
        """Computes logits for texts, and with labels also a differentiable loss.

        Raises:
            PrivacyError: the method trains no adapters, labels are given, and the texts weren't fetched before
                (`fetch`, `prepare`): which texts are sent together could depend on labels.
            LabelDependentBatches: the batches of a training loop depend on labels, and the method's guarantee requires
                that they don't. This is checked only after `prepare`.
        """
        self.check_backbone()
        target = None if labels is None else self._labels(labels)
        rows = self.backbone.rows(texts)
        if self._monitor is not None and target is not None and self.training and torch.is_grad_enabled():
            self._monitor.observe([row.ids for row in rows], target.tolist())
        dropout = self.backbone.adapter_config.lora_dropout > 0 and self.training and labels is not None
        seed = self.seed * 2**32 + self.backbone.steps if dropout else None
        if self.method.num_adapters:
            hidden = self.backbone.all_adapters(rows, seed=seed)  # (n, B, d)
        else:
            with nullcontext() if target is None else self.backbone.offline():
                hidden = self.method.inputs(self.backbone, rows).unsqueeze(0)
        mixed = self.method.mix(hidden)
        logits = self.head(mixed if self.auxiliary is None else mixed.detach())
        if target is None:
            return Output(logits)
        frozen = self.backbone.frozen(rows) if self.method.needs_frozen else None
        # in evaluation mode too, since that loss can be differentiated as well
        adapter_labels = self.method.adapter_labels(rows, target)
        task = self.loss(logits, adapter_labels if self.auxiliary is None else target)
        penalties = self.method.penalties(hidden, frozen, target) if self.training else {}
        if self.auxiliary is not None and self.training:
            penalties["auxiliary"] = self.loss(self.auxiliary(mixed), adapter_labels)
        total = torch.stack([task, *penalties.values()]).sum()
        parts = {name: float(value.detach()) for name, value in {"task": task, **penalties}.items()}
        return Output(logits, total, parts)

    def save_pretrained(self, folder: str | Path, *, classes: list[str] | None = None) -> None:
        """Writes PEFT adapters, the head and the run's secrets. Each file replaces the previous one atomically.

        Args:
            classes: class names in the order of their indices. Default: the indices.
        """
        self.check_backbone()
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_adapters(folder, self.backbone, self.ledger_run)
        save_head(folder, self.head, self.ledger_run)
        save_secret(folder, self.method, self.generator, self.ledger_run)
        if self.method.ledger is not None:
            self.method.ledger.attach(folder)
        remove_resume_of_another_run(folder, self.ledger_run)
        write_summary(folder, self._summary(classes))

    def _summary(self, classes: list[str] | None) -> LabelsSummary:
        info = self.backbone.info
        return LabelsSummary(
            method=self.method.name,
            options=options_of(self.method),
            model=info.name,
            base_model_name=info.base_model_name,
            fingerprint=info.fingerprint,
            max_length=self.backbone.max_length,
            run=self.ledger_run,
            hidden_size=self.backbone.hidden_size,
            readout=self.backbone.readout,
            pairs=self.backbone.pairs,
            codec=self.backbone.codec,
            adapters=self.backbone.num_adapters,
            seed=self.seed,
            head=type(self.head).__name__,
            loss=loss_name(self.loss),
            num_classes=self.classes,
            classes=classes or [str(index) for index in range(self.classes)],
        )

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        backbone: Backbone,
        *,
        head: nn.Module | None = None,
        loss: Loss | None = None,
        predict_only: bool = False,
    ) -> PrivateModel:
        """Loads a trained model onto a backbone whose operators host the same weights.

        Args:
            head: a module of the head's class, needed unless that is one of ours (`blindtune.labels.HEADS`, or what a
                method fits).
            loss: the loss, needed for further training with a loss of your own. Default: the checkpoint's.
            predict_only: see `PrivateModel`.
        Raises:
            CheckpointError: files are missing, the operators host another model, or the head doesn't fit.
        """
        folder = Path(folder)
        summary = read_summary(folder, LabelsSummary)
        check_fingerprint(summary, backbone, folder)
        check_readout_of(summary, backbone, folder)
        secret, generator = load_secret(folder, summary.run)
        head = load_head(folder, summary, head)
        if summary.run:
            read_journal_of(folder.resolve() / JOURNAL, summary.run)  # fails before the backbone is changed
        method = make_method(summary.method, summary.options)
        loss = LOSSES.get(summary.loss, F.cross_entropy) if loss is None else loss
        model = cls(
            backbone, head, method, loss=loss, generator=generator, seed=summary.seed, predict_only=predict_only
        )
        method.load_state_dict(secret)
        if method.ledger is not None:
            method.ledger.resume(folder, summary.run)
        # if labels have a privacy bound, NaN raises no error, which would reveal something: zeros are sent instead
        bounded = math.isfinite(method.label_mu)
        folders = adapter_folders(folder, summary.adapters)
        for adapter, path in zip(backbone.lora_adapters(), folders, strict=True):
            check_run(folder, summary.run, adapter.load_pretrained(path, allow_nonfinite=bounded))
        return model

    def earlier_runs(self, texts: Sequence[Text]) -> list[EarlierRun]:
        """Returns the other runs on this machine that have used labels of these texts."""
        return self.history.earlier(texts, but=self.run)

    def combined_guarantee(self, texts: Sequence[Text]) -> tuple[int, Guarantee]:
        """Returns the number of earlier runs with labels of these texts, and the guarantee of those and this run."""
        runs = self.earlier_runs(texts)
        return len(runs), gaussian_guarantee(total_mu(runs, self.method.label_mu))

    def register(self, texts: Sequence[Text] | Sequence[TokenRow]) -> None:
        """Records in this machine's history that the run uses labels of these texts."""
        if self.method.label_mu > 0:
            names = [repr(text.ids) if isinstance(text, TokenRow) else text for text in texts]
            self.history.register(self.run, self.method.label_mu, names)

    def _probe(self, rows: Sequence[TokenRow]) -> None:
        """Measures the method's precision on a few texts, chosen at random and so independently of labels."""
        if not self.method.num_adapters or not rows:
            return
        indices = self.generator.derive(b"texts of the probe").permutation(len(rows))[:PROBE_TEXTS]
        operators = self.backbone.channel.choose(len(self.backbone.pool), 0)
        batch = self.backbone.batch([rows[index] for index in indices], operators, None)
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
                f"Labels range from {int(target.min())} to {int(target.max())}; the head has {self.classes} classes.",
                remedy="Number the classes from 0, or use a head with more outputs.",
            )
        return target.long()


def _classes(head: nn.Module, hidden_size: int) -> int:
    """Returns K, the number of logits of a head. A `Head` may read something else than hidden states."""
    if isinstance(head, Head):
        return head.classes
    with torch.no_grad():
        return int(head(torch.zeros(1, hidden_size)).shape[-1])
