"""How close a package is to the checkpoint in PyTorch."""
