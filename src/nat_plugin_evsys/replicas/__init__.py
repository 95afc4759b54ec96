"""The engine on several devices: copies of a base model in processes that Ray places, restarts and talks to."""
