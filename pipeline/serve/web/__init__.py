"""The HTTP server: routes, keys, limits, health, metrics, and a page."""
