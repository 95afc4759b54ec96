"""The engine over HTTP: the Tinker protocol, and OpenAI's chat completions for any checkpoint."""
