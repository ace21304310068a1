"""Label-free questions to several operators, whose answers must agree: cheating and faults become visible.

In one of k training steps, at random, all operators of the step are asked for three things more than once: hidden
states under one adapter of pure noise, h(x, 0), and the gradient at θ = 0 for one share of pure noise. None of them
depends on labels, so the questions tell nothing. Each costs what a part of a step costs: about 1/k in time.

An operator that recognises these questions, by their coming twice for the same texts, can answer them honestly and
lie elsewhere. That can spoil the model; it can't loosen the bound on what labels tell, which doesn't use honesty.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from blindtune.client import OperatorPool, RemoteBatch
from blindtune.errors import OperatorsDisagree
from blindtune.keystream import KEY_BYTES
from blindtune.lattice import Lattice
from blindtune.methods.gradients import noise_share
from blindtune.methods.state import write_tensors
from blindtune.privacy.ledger import Ledger, Message
from blindtune.privacy.randomness import SecureGenerator

MEMBERS = 2
HIDDEN_TOLERANCE = 2e-5
"""Relative difference of hidden states that other processors explain."""
GRADIENT_TOLERANCE = 2e-4


@dataclass
class IntegrityCheck:
    """Asks operators the same label-free questions, in one of `every` steps.

    Attributes:
        ledger: where the questions are written down, at no cost; evidence is saved beside its journal.
        every: k; 0 for no questions.
    """

    generator: SecureGenerator
    ledger: Ledger
    every: int
    asked: int = field(init=False, default=0)
    """Steps in which questions were asked."""
    _steps: int = field(init=False, default=0)

    def before_step(self, batch: RemoteBatch, pool: OperatorPool, pads: Lattice, shares: Lattice) -> None:
        """Asks, if it is this step's turn.

        Args:
            pads, shares: lattices of the noise that operators get anyway.
        Raises:
            OperatorsDisagree: two answers differ; they are saved.
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
        everybody = batch.operators
        urls = [pool.urls[index] for index in everybody]
        self.ledger.enlist(pool.names)
        self.ledger.record(Message("check", dict.fromkeys([pool.names[index] for index in everybody], 0.0)))
        holders = everybody[:MEMBERS]
        padded = pool.parallel([_forward(noise, pool, operator, retain=False) for operator in holders])
        self._compare("hidden states under an adapter of noise", noise, padded, urls, HIDDEN_TOLERANCE)
        frozen = pool.parallel([_forward(zero, pool, operator, retain=True) for operator in everybody])
        self._compare("hidden states of the pretrained model", zero, frozen, urls, HIDDEN_TOLERANCE)
        gradients = pool.parallel([lambda o=operator: zero.backward(pool, o, share) for operator in everybody])
        self._compare("the gradient of a share of noise", zero, gradients, urls, GRADIENT_TOLERANCE)

    def _compare(
        self, question: str, batch: RemoteBatch, answers: list[Tensor], urls: list[str], tolerance: float
    ) -> None:
        first = answers[0].double()
        for url, answer in zip(urls[1:], answers[1:], strict=False):
            apart = float((answer.double() - first).norm() / first.norm().clamp_min(1e-30))
            if not apart <= tolerance:
                saved = self._save(question, batch, answers, urls)
                raise OperatorsDisagree(
                    f"{urls[0]} and {url} gave different answers when asked for {question}: relative difference "
                    f"{apart:.2g}, where other processors explain {tolerance:g}.",
                    remedy=f"One of them is faulty or cheats, so nothing more is sent. {saved}",
                )

    def _save(self, question: str, batch: RemoteBatch, answers: list[Tensor], urls: list[str]) -> str:
        if not self.ledger.journals:
            return "The answers were not saved: the run has no folder."
        path = self.ledger.journals[0].with_name(f"evidence-{self._steps}.safetensors")
        tensors = {f"answer.{index}": answer for index, answer in enumerate(answers)}
        facts = {"question": question, "operators": json.dumps(urls), "spec": batch.spec.model_dump_json()}
        write_tensors(path, {**batch.tokens.tensors(), "adapter": batch.weights, **tensors}, facts)
        return f"The question and both answers are in {path}."


def _forward(batch: RemoteBatch, pool: OperatorPool, operator: int, *, retain: bool) -> Callable[[], Tensor]:
    def work() -> Tensor:
        hidden = batch.forward(pool, operator, retain=retain)
        if hidden is None:
            raise OperatorsDisagree(f"{pool.operators[operator].transport.url} sent no hidden states.")
        return hidden

    return work
