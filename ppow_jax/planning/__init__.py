"""Resource plans for devices that are not available: programs are compiled and counted, never run."""
