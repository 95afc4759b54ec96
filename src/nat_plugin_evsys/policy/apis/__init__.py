"""The APIs beside chat completions, each answered from the same recorded samples."""
