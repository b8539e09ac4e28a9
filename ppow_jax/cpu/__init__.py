"""What XLA:CPU does too slowly: a matrix product of our own, compiled on this machine when it is first needed."""
