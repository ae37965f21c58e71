"""The model in a process of its own: a queue in front of it, cached conversations, grammars."""
