"""A package: what is in it, who vouches for it, and every check before it is loaded."""
