"""The workflow as NAT runs and scores it, with every rollout recorded and bounded."""
