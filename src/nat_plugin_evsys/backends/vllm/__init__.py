"""Rollouts sampled by a vLLM server. It is spoken to over HTTP: nothing here imports vLLM."""
