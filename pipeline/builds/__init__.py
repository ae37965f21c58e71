"""From a recipe to a package: the plan, the store, and what walks the one against the other."""
