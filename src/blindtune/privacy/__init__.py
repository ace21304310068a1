"""Defences as functions on tensors, without network or models, and the accounting of what operators can learn."""
