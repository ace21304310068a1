"""The data owner's side: hosted models as torch modules, run by one or several operators."""

from blindtune.client.backbone import Backbone, Layers, Pairs, select_layers
from blindtune.client.channel import Channel, PlainChannel, RemoteBatch
from blindtune.client.feature_store import FeatureStore
from blindtune.client.operators import Operator, OperatorPool, Upload
from blindtune.client.transport import Timeout, Traffic, Transport
from blindtune.client.trunk import RemoteTrunk, fetch_emulator, fetch_part
from blindtune.client.tuned_parts import DeployedModel

__all__ = [
    "Backbone",
    "Channel",
    "DeployedModel",
    "FeatureStore",
    "Layers",
    "Operator",
    "OperatorPool",
    "Pairs",
    "PlainChannel",
    "RemoteBatch",
    "RemoteTrunk",
    "Timeout",
    "Traffic",
    "Transport",
    "Upload",
    "fetch_emulator",
    "fetch_part",
    "select_layers",
]
