"""The data owner's side: hosted models as torch modules, over one or several operators."""

from blindtune.client.backbone import Backbone
from blindtune.client.channel import Channel, PlainChannel, RemoteBatch
from blindtune.client.operators import Operator, OperatorPool, Upload
from blindtune.client.plugin import RemotePlugin
from blindtune.client.transport import Patience, Traffic, Transport
from blindtune.client.trunk import RemoteTrunk, fetch_emulator, fetch_part

__all__ = [
    "Backbone",
    "Channel",
    "Operator",
    "OperatorPool",
    "Patience",
    "PlainChannel",
    "RemoteBatch",
    "RemotePlugin",
    "RemoteTrunk",
    "Traffic",
    "Transport",
    "Upload",
    "fetch_emulator",
    "fetch_part",
]
