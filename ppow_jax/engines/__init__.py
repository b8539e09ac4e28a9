"""Serving engines that read our drafters: what each reads, and a check that each accepts what we accept."""
