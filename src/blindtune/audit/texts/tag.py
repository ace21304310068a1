"""TAG: finds the labels whose gradient equals the received one. At positions with a loss, labels are the next tokens.

The provider knows s_B, because it computed s_B. So only the labels are unknown, and g_B is *linear* in them. Let u_t
be the gradient of the loss with respect to the input of the head at position t, J the Jacobian of the top at s_B, and W
the rows of the head. Then

    g_B = Jᵀ u,    u_t = w (Σ_v p_t(v) W_v − W_label)      p_t: prediction of the pretrained top, w: 1 / labels

TAG (Deng et al. 2021) takes gradient steps on soft labels. Here, conjugate gradients solve for u by least squares, and
stop early, which suppresses the noise of quantization. The score of a label is its direction, cos(−u_t, W_v − Σ p W),
times p_t(v). At positions without a loss u_t is noise (g_B isn't zero there, because attention mixes positions), and
p_t decides; there TAG equals Direct Forward. TAG needs no bottom, so perturbing s_A doesn't hide labels from it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from blindtune.audit.solvers import TINY, JacobianProducts, conjugate_gradients
from blindtune.audit.texts.attacker import Attacker, chunks
from blindtune.audit.texts.direct import head_input, shortlist_after_first
from blindtune.audit.texts.observe import Observed
from blindtune.audit.texts.registry import attack
from blindtune.audit.texts.shortlist import Shortlist
from blindtune.models.cut.parts import pack, unpack

DIRECTIONS = 64
"""Effective number of independent values of u, which sets the weight of the direction relative to the prior. It is less
than e, because the errors of u aren't independent."""


@attack("TAG", observes=("s_B", "gradients"), needs=("top", "public text"))
def tag(observed: Observed, attacker: Attacker) -> Tensor:
    return shortlist_after_first(next_shortlist(observed, attacker), observed, attacker).best


class TopGradient:
    """Multiplies the Jacobian J of the top at one batch of s_B `(n, d)`, and its transpose, with vectors."""

    def __init__(self, hidden: Tensor, lengths: Tensor, attacker: Attacker) -> None:
        top = attacker.model.parts["top"]
        self._lengths = lengths
        padded = unpack(hidden, lengths).to(next(top.parameters()).dtype)
        self._products = JacobianProducts(lambda states: top(states, lengths), padded)

    @property
    def width(self) -> int:
        """Returns e, the size of the input of the head."""
        return self._products.output.shape[-1]

    def backward(self, head_gradient: Tensor) -> Tensor:
        """Returns Jᵀ u `(n, d)` for u `(n, e)`."""
        return pack(self._products.transposed(unpack(head_gradient, self._lengths)), self._lengths).float()

    def forward(self, direction: Tensor) -> Tensor:
        """Returns J v `(n, e)` for v `(n, d)`."""
        return pack(self._products.times(unpack(direction, self._lengths)), self._lengths).float()


def solve(observed: Observed, attacker: Attacker) -> Tensor:
    """Returns u `(N, e)`: the gradient at the head whose Jᵀ u is nearest to g_B, by conjugate gradients (CGLS)."""
    return observed.remember("gradient at the head", attacker, lambda: _solve_all(observed, attacker))


def _solve_all(observed: Observed, attacker: Attacker) -> Tensor:
    lengths = observed.lengths.to(attacker.device)
    solutions: list[Tensor] = []
    for (hidden, part), (gradient, _) in zip(
        chunks(observed.s_b, lengths), chunks(observed.received_gradients, lengths), strict=True
    ):
        solutions.append(_solve(TopGradient(hidden, part, attacker), gradient, part, attacker.budget.solver_steps))
    return torch.cat(solutions)


def _solve(top: TopGradient, gradient: Tensor, lengths: Tensor, steps: int) -> Tensor:
    text_of = torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths)

    def squared_norm(x: Tensor) -> Tensor:
        """Returns |x|² of each text, for each of its tokens, `(n, 1)`."""
        sums = torch.zeros(len(lengths), device=x.device).index_add(0, text_of, x.square().sum(1))
        return sums[text_of].unsqueeze(1)

    scale = squared_norm(gradient).sqrt().clamp_min(TINY)  # gradients are small
    start = gradient.new_zeros(len(gradient), top.width)
    return scale * conjugate_gradients(top.backward, top.forward, gradient / scale, start, squared_norm, steps)


def next_shortlist(observed: Observed, attacker: Attacker, *, prior: bool = True) -> Shortlist:
    """Returns candidates for the next token of each position; without `prior`, from the gradient alone."""

    def make() -> Shortlist:
        return label_shortlist(solve(observed, attacker), head_input(observed, attacker), attacker, prior=prior)

    return observed.remember(f"next tokens, prior {prior}", attacker, make)


def label_shortlist(head_gradients: Tensor, head_inputs: Tensor, attacker: Attacker, *, prior: bool) -> Shortlist:
    """Returns candidates for labels, from u `(N, e)` and the input of the head `(N, e)`."""
    head = attacker.head
    sizes = head.square().sum(1)

    def score(positions: slice) -> Tensor:
        log_p = (head_inputs[positions] @ head.T).log_softmax(-1)  # (n, V)
        mean = log_p.exp() @ head
        u = head_gradients[positions]
        along = (u * mean).sum(1, keepdim=True) - u @ head.T  # −u · (W_v − mean)
        distance = (sizes - 2 * mean @ head.T + mean.square().sum(1, keepdim=True)).clamp_min(1e-6).sqrt()
        cosine = (along / distance / u.norm(dim=1, keepdim=True).clamp_min(TINY)).clamp(0.0, 0.9999)
        evidence = -0.5 * DIRECTIONS * (1 - cosine.square()).log()
        return log_p + evidence if prior else evidence

    return Shortlist.of(score, len(head_inputs), attacker.budget.candidates)
