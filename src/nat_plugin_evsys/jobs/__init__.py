"""Training jobs: the asyncio task of one submit, its work, and the ledger on disk."""
