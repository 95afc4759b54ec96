"""The messages of the Tinker protocol; ``scripts/generate-proto`` makes the Python from the .proto file."""
