"""One package in the forms in which it is handed over."""
