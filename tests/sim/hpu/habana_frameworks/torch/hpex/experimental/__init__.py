"""SIMULATION of habana_frameworks.torch.hpex.experimental."""
