"""The engine over HTTP: routes and what guards them."""
