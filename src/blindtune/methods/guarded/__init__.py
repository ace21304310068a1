"""GuardedTuning: the client holds a decoder's ends, and the middle runs elsewhere; texts never leave.

| file | what |
|---|---|
| `model` | a causal language model whose middle is a function: the provider's trunk, or an emulator of it |
| `ends` | which weights of the ends are trained (LoRA or all), and their checkpoints |
| `designs` | Online, Gradfree, Offline and Offsite-Tuning: what a step computes, and what of it travels |
| `smashed` | the store of hidden states that Gradfree has fetched already |
"""

from blindtune.methods.guarded.designs import DESIGNS, Design, Gradfree, Offline, Offsite, Online, make_design
from blindtune.methods.guarded.ends import Ends, read_ends, read_run, read_tuned
from blindtune.methods.guarded.model import CausalBatch, SplitCausalLM
from blindtune.methods.guarded.smashed import SmashedStore

__all__ = [
    "DESIGNS",
    "CausalBatch",
    "Design",
    "Ends",
    "Gradfree",
    "Offline",
    "Offsite",
    "Online",
    "SmashedStore",
    "SplitCausalLM",
    "make_design",
    "read_ends",
    "read_run",
    "read_tuned",
]
