"""The bundled demo: its tasks, its training, and `make demo`."""
