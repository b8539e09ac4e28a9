"""What a program would take on a device that is not there: compiled, counted, never run."""
