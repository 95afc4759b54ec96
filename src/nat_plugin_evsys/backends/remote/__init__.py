"""Any service that speaks the Tinker protocol, as a backend."""
