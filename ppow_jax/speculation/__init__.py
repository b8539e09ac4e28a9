"""Propose, verify, accept, generate: decoding as pure functions over fixed shapes."""
