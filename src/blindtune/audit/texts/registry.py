"""Registers attacks on texts. Each attack declares what it observes and what it needs to know.

| attack | observes | method |
|---|---|---|
| unigram guess, language model guess | nothing | floors: guesses from public text and from the model |
| direct forward | s_B | the pretrained top predicts each next token |
| nearest token | s_A | the token whose hidden state in one context is nearest |
| nearest, left to right | s_A | the same in the recovered context, with the model's prediction as prior |
| SIP, SIP on s_B | s_A, s_B | an inverter that was trained on public text |
| EIA | s_A | gradient steps on token logits, so that the output of the bottom approaches s_A |
| TAG | s_B, gradients | labels that give g_B: the *next* tokens of positions with a loss |
| LAMP | s_B, gradients | TAG, then random changes that improve the match and the likelihood |
| BiSR(f), BiSR(b), BiSR | s_A; all; all | SIP, refined by s_A, by g_B, by both |

Gradients give no information about positions without a loss, nor about the first token of a text.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from blindtune.audit.texts.attacker import Attacker
from blindtune.audit.texts.observe import Observed, Visible

Needs = Literal["bottom", "trunk", "top", "public text"]
AttackFunction = Callable[[Observed, Attacker], Tensor]
"""Returns a guess for every token, `(N,)` int64."""


@dataclass(frozen=True)
class Attack:
    """Reconstructs texts from hidden states or gradients."""

    name: str
    observes: tuple[Visible, ...]
    needs: tuple[Needs, ...]
    function: AttackFunction

    @property
    def floor(self) -> bool:
        """Returns whether the attack observes nothing. Other attacks must be better than a floor."""
        return not self.observes

    def applies(self, observed: Observed) -> bool:
        """Returns whether everything that the attack observes was sent."""
        return "gradients" not in self.observes or observed.g_b is not None

    def run(self, observed: Observed, attacker: Attacker) -> Tensor:
        """Returns guesses `(N,)` from what the attack declares to observe. Equal seeds give equal guesses."""
        visible = observed.only(self.observes).to(attacker.device)
        return attacker.seeded(self.name, lambda: self.function(visible, attacker)).cpu()


ATTACKS: dict[str, Attack] = {}


def attack(
    name: str, *, observes: tuple[Visible, ...] = (), needs: tuple[Needs, ...] = ()
) -> Callable[[AttackFunction], AttackFunction]:
    """Registers an attack on texts."""

    def register(function: AttackFunction) -> AttackFunction:
        ATTACKS[name] = Attack(name, observes, needs, function)
        return function

    return register
