"""Sends the same label-free requests to several operators and compares their responses, to detect cheating and faults.

In a random one of k training steps, several operators of the step are sent the same three requests: for hidden states
under one adapter of pure noise, for h(x, 0), and for the gradient at θ = 0 of one share of pure noise. None of them
depends on labels, so they reveal nothing about labels. A check takes about as long as a step, so checks lengthen a run
by a fraction of about 1/k.

An operator that recognises these requests, because they repeat the same texts, can answer them correctly and all others
incorrectly. That can spoil the model, but it doesn't weaken the bound on what labels are revealed, which doesn't assume
honest operators.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from blindtune.client import OperatorPool, RemoteBatch
from blindtune.errors import OperatorsDisagree
from blindtune.files import write_tensors
from blindtune.keystream import KEY_BYTES
from blindtune.labels.channels.private_backprop import noise_share
from blindtune.lattice import Lattice
from blindtune.privacy.ledger import Ledger, Message
from blindtune.privacy.randomness import SecureGenerator

MEMBERS = 2
"""Number of operators that each get a padded adapter."""
HIDDEN_TOLERANCE = 2e-5
"""Largest relative difference of hidden states that may be due to different processors."""
GRADIENT_TOLERANCE = 2e-4
"""Largest relative difference of gradients that may be due to different processors."""


@dataclass
class IntegrityCheck:
    """Compares operators' responses to the same label-free requests, in a random one of `every` steps.

    Attributes:
        generator: secret random generator.
        ledger: ledger that records these requests, with cost 0. Evidence is saved beside its journal.
        every: k, the average number of steps between checks; 0 for no checks.
    """

    generator: SecureGenerator
    ledger: Ledger
    every: int
    asked: int = field(init=False, default=0)
    """Number of steps so far with a check."""
    _steps: int = field(init=False, default=0)

    def before_step(self, batch: RemoteBatch, pool: OperatorPool, pads: Lattice, shares: Lattice) -> None:
        """Checks the operators, if this step is drawn for a check.

        Args:
            pads, shares: lattices of the run's pads and gradient shares, from which the noise is drawn.
        Raises:
            OperatorsDisagree: two responses differ. They are saved first.
        """
        self._steps += 1
        if self.every == 0:
            return
        key = self.generator.derive(b"integrity", self._steps.to_bytes(8, "little"))
        if float(key.uniform(1)) > 1.0 / self.every:
            return
        self.asked += 1
        noise = batch.with_weights(pads.values(pads.noise(key, batch.weights.shape)))
        zero = batch.with_weights(torch.zeros_like(batch.weights[:1]))
        share = noise_share(key.bytes(KEY_BYTES), shares)
        operators = batch.operators
        urls = [pool.urls[index] for index in operators]
        self.ledger.enlist(pool.names)
        self.ledger.record(Message("check", dict.fromkeys([pool.names[index] for index in operators], 0.0)))
        holders = operators[:MEMBERS]
        padded = pool.parallel([_forward(noise, pool, operator, retain=False) for operator in holders])
        self._compare("hidden states under an adapter of noise", noise, padded, urls, HIDDEN_TOLERANCE)
        frozen = pool.parallel([_forward(zero, pool, operator, retain=True) for operator in operators])
        self._compare("hidden states of the pretrained model", zero, frozen, urls, HIDDEN_TOLERANCE)
        gradients = pool.parallel([lambda o=operator: zero.backward(pool, o, share) for operator in operators])
        self._compare("the gradient of a share of noise", zero, gradients, urls, GRADIENT_TOLERANCE)

    def _compare(
        self, question: str, batch: RemoteBatch, answers: list[Tensor], urls: list[str], tolerance: float
    ) -> None:
        first = answers[0].double()
        for url, answer in zip(urls[1:], answers[1:], strict=False):
            difference = float((answer.double() - first).norm() / first.norm().clamp_min(1e-30))
            if not difference <= tolerance:  # NaN is a difference too
                saved = self._save(question, batch, answers, urls)
                raise OperatorsDisagree(
                    f"{urls[0]} and {url} gave different answers when asked for {question}: relative difference "
                    f"{difference:.2g}, where other processors explain {tolerance:g}.",
                    remedy=f"One of them is faulty or cheats, so nothing more is sent. {saved}",
                )

    def _save(self, question: str, batch: RemoteBatch, answers: list[Tensor], urls: list[str]) -> str:
        if not self.ledger.journals:
            return "The answers were not saved, because the run has no folder."
        path = self.ledger.journals[0].with_name(f"evidence-{self._steps}.safetensors")
        tensors = {f"answer.{index}": answer for index, answer in enumerate(answers)}
        metadata = {"question": question, "operators": json.dumps(urls), "spec": batch.spec.model_dump_json()}
        write_tensors(path, {**batch.tokens.tensors(), "adapter": batch.weights, **tensors}, metadata)
        return f"The question and the answers are in {path}."


def _forward(batch: RemoteBatch, pool: OperatorPool, operator: int, *, retain: bool) -> Callable[[], Tensor]:
    return lambda: batch.forward(pool, operator, retain=retain)
