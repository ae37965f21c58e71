"""From float graphs to integer ones."""
