"""Checkpoints: fetched, converted, checked, read, and run as the reference."""
