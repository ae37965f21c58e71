"""Serving packages: an engine with the model in a process of its own, an API of Python, and a server like OpenAI's."""
