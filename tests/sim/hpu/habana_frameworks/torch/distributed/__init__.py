"""SIMULATION of habana_frameworks.torch.distributed."""
