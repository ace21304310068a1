"""Defences as pure tensor functions; no network, no models."""
