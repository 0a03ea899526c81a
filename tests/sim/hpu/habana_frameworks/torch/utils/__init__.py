"""SIMULATION of habana_frameworks.torch.utils."""
