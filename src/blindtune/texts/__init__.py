"""Training with private texts: the client holds a decoder's ends, and the trunk runs elsewhere.

Training sends the server hidden states, their gradients and the lengths of texts at most, never tokens.

| file | content |
|---|---|
| `boundary` | sends hidden states to the trunk: encoding of tokens, noise, the trunk, a record of what was sent |
| `model` | a causal language model from two ends and a boundary |
| `ends` | the weights of the ends that are trained (LoRA or all), and their checkpoints |
| `designs/` | Online, Gradfree, Offline and Offsite-Tuning, one file each |
| `activation_store` | hidden states that Gradfree has already fetched |
| `trainer`, `costs`, `evaluate` | training, its costs, and evaluation by likelihood |
| `session` | connects the ends and the trunk of a hosted model |
| `shadow` | the adaptive attacker of an audit: a client that is trained on public text (extra `audit`) |
"""

from blindtune.texts.activation_store import ActivationStore
from blindtune.texts.boundary import Boundary, LocalTrunk, Trunk
from blindtune.texts.costs import Costs
from blindtune.texts.designs import DESIGNS, Design, Gradfree, Offline, Offsite, Online, design, make_design
from blindtune.texts.ends import Ends, merge_checkpoint, read_ends, read_tuned_parts
from blindtune.texts.evaluate import DeployedScorer, Scorer, evaluate_questions, score_answers
from blindtune.texts.model import CausalBatch, CutCausalLM
from blindtune.texts.trainer import Step, TrainConfig, Trainer

__all__ = [
    "DESIGNS",
    "ActivationStore",
    "Boundary",
    "CausalBatch",
    "Costs",
    "CutCausalLM",
    "DeployedScorer",
    "Design",
    "Ends",
    "Gradfree",
    "LocalTrunk",
    "Offline",
    "Offsite",
    "Online",
    "Scorer",
    "Step",
    "TrainConfig",
    "Trainer",
    "Trunk",
    "design",
    "evaluate_questions",
    "make_design",
    "merge_checkpoint",
    "read_ends",
    "read_tuned_parts",
    "score_answers",
]
