"""Choosing: a model for a device, and for each weight how it is stored."""
