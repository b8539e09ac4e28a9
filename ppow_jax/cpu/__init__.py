"""Custom CPU kernels for operations that are slow in XLA:CPU, compiled on this machine when first needed."""
