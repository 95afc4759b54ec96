"""How the model families write tool calls: one module for each kind of form."""
