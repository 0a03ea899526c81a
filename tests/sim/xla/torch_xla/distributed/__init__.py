"""SIMULATION of torch_xla.distributed."""
