"""Packages timed against one another and against other tools, each in a process of its own."""
