"""The attacks on inputs. Each says what it looks at and what it needs to know, and is registered under its name.

| attack | looks at | in a sentence |
|---|---|---|
| unigram guess, language model guess | nothing | floors: what a text gives away by being text |
| direct forward | s_B | the pretrained top predicts each next token |
| nearest token | s_A | which token, in an average context, would have given this hidden state |
| nearest, left to right | s_A | the same in the context that has been recovered so far, with the model's own prior |
| SIP, SIP on s_B | s_A, s_B | an inverter learned from public text |
| EIA | s_A | token logits, optimised until the bottom gives s_A |
| TAG | s_B, gradients | labels that give g_B: the *next* tokens where the loss was taken |
| LAMP | s_B, gradients | TAG, then moves towards a better match that reads better |
| BiSR(f), BiSR(b), BiSR | all | SIP, refined by s_A, by g_B, by both |

Attacks on gradients learn nothing new about positions where no loss was taken, and never about a text's first token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from blindtune.audit.inputs.attacker import Attacker
from blindtune.audit.inputs.observe import Observed, Seen

Needs = Literal["bottom", "trunk", "top", "public text"]
AttackFunction = Callable[[Observed, Attacker], Tensor]
"""A guess for every token, `(N,)` int64."""


@dataclass(frozen=True)
class Attack:
    """A way to read texts from hidden states or gradients."""

    name: str
    observes: tuple[Seen, ...]
    needs: tuple[Needs, ...]
    function: AttackFunction

    @property
    def floor(self) -> bool:
        """Whether it looks at nothing: what others must beat."""
        return not self.observes

    def applies(self, observed: Observed) -> bool:
        return "gradients" not in self.observes or observed.g_b is not None

    def run(self, observed: Observed, attacker: Attacker) -> Tensor:
        """Guesses `(N,)`, from nothing but what the attack declares; equal seeds, equal guesses."""
        seen = observed.only(self.observes).to(attacker.device)
        return attacker.seeded(self.name, lambda: self.function(seen, attacker)).cpu()


ATTACKS: dict[str, Attack] = {}


def attack(
    name: str, *, observes: tuple[Seen, ...] = (), needs: tuple[Needs, ...] = ()
) -> Callable[[AttackFunction], AttackFunction]:
    """Registers an attack on inputs."""

    def register(function: AttackFunction) -> AttackFunction:
        ATTACKS[name] = Attack(name, observes, needs, function)
        return function

    return register
