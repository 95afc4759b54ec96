"""What the two HTTP servers of this package share: the policy endpoint and ``nat evsys serve``."""
