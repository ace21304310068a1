"""Channels: how the adapters and gradients of a private method are sent to operators."""
