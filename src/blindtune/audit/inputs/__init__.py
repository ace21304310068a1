"""Attacks on inputs: what a split model's trunk saw, back to texts. Importing this package fills the registry."""

from blindtune.audit.inputs.attacker import Attacker, Budget
from blindtune.audit.inputs.bisr import bisr, bisr_backward, bisr_forward
from blindtune.audit.inputs.direct import direct_forward
from blindtune.audit.inputs.eia import eia
from blindtune.audit.inputs.evaluate import Reconstruction, attack_inputs, headline
from blindtune.audit.inputs.floors import language_model, unigram
from blindtune.audit.inputs.lamp import lamp
from blindtune.audit.inputs.link import Linked, link_repeats
from blindtune.audit.inputs.metrics import METRICS, Interval
from blindtune.audit.inputs.nearest import nearest_left_to_right, nearest_token
from blindtune.audit.inputs.observe import Exchange, Observed, TrueCall, Truth, read_exchanges
from blindtune.audit.inputs.registry import ATTACKS, Attack, attack
from blindtune.audit.inputs.sip import sip, sip_on_s_b
from blindtune.audit.inputs.tag import tag

__all__ = [
    "ATTACKS",
    "METRICS",
    "Attack",
    "Attacker",
    "Budget",
    "Exchange",
    "Interval",
    "Linked",
    "Observed",
    "Reconstruction",
    "TrueCall",
    "Truth",
    "attack",
    "attack_inputs",
    "bisr",
    "bisr_backward",
    "bisr_forward",
    "direct_forward",
    "eia",
    "headline",
    "lamp",
    "language_model",
    "link_repeats",
    "nearest_left_to_right",
    "nearest_token",
    "read_exchanges",
    "sip",
    "sip_on_s_b",
    "tag",
    "unigram",
]
