"""Benchmarks of decoding and training on the device at hand, against its peak performance."""
