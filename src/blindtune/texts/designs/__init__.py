"""The designs of GuardedTuning, and Offsite-Tuning: what one step computes, and what it sends.

| design | trained | sent in a step |
|---|---|---|
| Online | bottom and top | s_A up, s_B down, g_B up, g_A down |
| Gradfree | top (`zo`: the bottom too, by two-point estimates) | s_A up, s_B down, once for each example; no gradient |
| Offline | bottom and top (`tune_emulator`: its blocks too), around an emulator of the trunk | nothing |
| Offsite | as Offline, without regularizer and quantization (Xiao et al. 2023) | nothing |

Importing this package registers all of them in `DESIGNS`.
"""

from blindtune.texts.designs.base import DESIGNS, Design, design, design_options, make_design
from blindtune.texts.designs.gradfree import Gradfree
from blindtune.texts.designs.offline import Offline, Offsite
from blindtune.texts.designs.online import Online

__all__ = ["DESIGNS", "Design", "Gradfree", "Offline", "Offsite", "Online", "design", "design_options", "make_design"]
