"""TAG: labels whose gradient is the one that was received. Where the loss is taken, labels are the next tokens.

With s_B known (the provider computed it) there is nothing to guess but labels, and g_B is *linear* in them: with u_t
the loss's gradient with respect to what the head reads at position t, J the top's Jacobian at s_B, W the head's rows,

    g_B = Jᵀ u,    u_t = w (Σ_v p_t(v) W_v − W_label)      p_t: the pretrained top's own prediction, w: 1 / labels

So where TAG (Deng et al. 2021) takes gradient steps on soft labels, conjugate gradients solve for u (least squares,
stopped early, which keeps quantization's noise out), and each label is read off by its direction,
cos(−u_t, W_v − Σ p W), times p_t(v). Where no loss was taken u_t is noise (attention mixes positions, so g_B isn't zero
there), and p_t decides: there TAG is Direct Forward. It needs no bottom: what is done to s_A hides no label from it.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from blindtune.audit.inputs.attacker import Attacker, chunks
from blindtune.audit.inputs.direct import read_by_head, shortlist_after_first
from blindtune.audit.inputs.observe import Observed
from blindtune.audit.inputs.registry import attack
from blindtune.audit.inputs.shortlist import Shortlist
from blindtune.models.split import pack, padding_mask, unpack

DIRECTIONS = 64
"""Independent values that a direction is taken to have: its weight against the prior. Errors of u aren't independent,
so this is less than e."""


@attack("TAG", observes=("s_B", "gradients"), needs=("top", "public text"))
def tag(observed: Observed, attacker: Attacker) -> Tensor:
    return shortlist_after_first(next_shortlist(observed, attacker), observed, attacker).best


class TopGradient:
    """g_B as a function of u for one batch of s_B `(n, d)`: products with the top's Jacobian and with its transpose."""

    def __init__(self, hidden: Tensor, lengths: Tensor, attacker: Attacker) -> None:
        top = attacker.model.parts["top"]
        self._lengths = lengths
        self._leaf = unpack(hidden, lengths).to(next(top.parameters()).dtype).requires_grad_()
        self._mask = padding_mask(lengths, self._leaf.shape[1]).bool().unsqueeze(-1)
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):  # the fast kernels have no second derivative
            self._output = top(self._leaf, lengths)
            self._seed = torch.zeros_like(self._output).requires_grad_()
            (self._gradient,) = torch.autograd.grad(self._output, self._leaf, self._seed, create_graph=True)

    def backward(self, read: Tensor) -> Tensor:
        """Jᵀ u `(n, d)` for u `(n, e)`."""
        given = unpack(read, self._lengths).to(self._output)
        (result,) = torch.autograd.grad(self._output, self._leaf, given, retain_graph=True)
        return pack(result, self._lengths).float()

    def forward(self, change: Tensor) -> Tensor:
        """J v `(n, e)` for v `(n, d)`."""
        given = unpack(change, self._lengths).to(self._gradient)
        (result,) = torch.autograd.grad(self._gradient, self._seed, given, retain_graph=True)
        return pack(result, self._lengths).float()


def solve(observed: Observed, attacker: Attacker) -> Tensor:
    """u `(N, e)`: the gradient at the head for which the pretrained top would have sent g_B (CGLS, text by text)."""
    return observed.remember("gradient at the head", attacker, lambda: _solve_all(observed, attacker))


def _solve_all(observed: Observed, attacker: Attacker) -> Tensor:
    lengths = observed.lengths.to(attacker.device)
    both = torch.cat([observed.s_b, observed.received_gradients], dim=1)
    parts: list[Tensor] = []
    for part, some in chunks(both, lengths):
        hidden, gradient = part.chunk(2, dim=1)
        parts.append(_solve(TopGradient(hidden, some, attacker), gradient, some, attacker.budget.solver_steps))
    return torch.cat(parts)


def _solve(top: TopGradient, gradient: Tensor, lengths: Tensor, steps: int) -> Tensor:
    text = torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths)

    def square(x: Tensor) -> Tensor:
        """|x|² of each text, for each of its tokens, `(n, 1)`."""
        return torch.zeros(len(lengths), device=x.device).index_add(0, text, x.square().sum(1))[text].unsqueeze(1)

    size = square(gradient).sqrt().clamp_min(1e-30)
    residual = gradient / size  # gradients are tiny
    normal = top.forward(residual)
    direction, solution, slope = normal, torch.zeros_like(normal), square(normal)
    for _ in range(steps):
        moved = top.backward(direction)
        step = slope / square(moved).clamp_min(1e-30)
        solution = solution + step * direction
        residual = residual - step * moved
        normal = top.forward(residual)
        slope, before = square(normal), slope
        direction = normal + slope / before.clamp_min(1e-30) * direction
    return solution * size


def next_shortlist(observed: Observed, attacker: Attacker, *, prior: bool = True) -> Shortlist:
    """Candidates for each position's next token; by the gradient alone without `prior`."""

    def make() -> Shortlist:
        return label_shortlist(solve(observed, attacker), read_by_head(observed, attacker), attacker, prior=prior)

    return observed.remember(f"next tokens, prior {prior}", attacker, make)


def label_shortlist(at_head: Tensor, read: Tensor, attacker: Attacker, *, prior: bool) -> Shortlist:
    """Candidates for labels, from u `(N, e)` and what the head reads `(N, e)`."""
    head = attacker.head
    sizes = head.square().sum(1)

    def score(some: slice) -> Tensor:
        log_p = (read[some] @ head.T).log_softmax(-1)  # (n, V)
        mean = log_p.exp() @ head
        u = at_head[some]
        along = (u * mean).sum(1, keepdim=True) - u @ head.T  # −u · (W_v − mean)
        apart = (sizes - 2 * mean @ head.T + mean.square().sum(1, keepdim=True)).clamp_min(1e-6).sqrt()
        cosine = (along / apart / u.norm(dim=1, keepdim=True).clamp_min(1e-30)).clamp(0.0, 0.9999)
        evidence = -0.5 * DIRECTIONS * (1 - cosine.square()).log()
        return log_p + evidence if prior else evidence

    return Shortlist.of(score, len(read), attacker.budget.candidates)
