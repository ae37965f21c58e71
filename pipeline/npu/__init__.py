"""Graphs of fixed shapes, and the compilers of neural processors."""
