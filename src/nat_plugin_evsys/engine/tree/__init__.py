"""Sequences with shared prefixes, each shared token computed once."""
