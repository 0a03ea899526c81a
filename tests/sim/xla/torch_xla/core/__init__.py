"""SIMULATION of torch_xla.core."""
