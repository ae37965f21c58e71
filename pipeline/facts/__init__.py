"""What is true of models, targets and schemes, and what a recipe says: frozen values, no heavy import."""
