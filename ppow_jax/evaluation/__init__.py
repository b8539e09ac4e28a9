"""Benchmarks, measurement and reports."""
