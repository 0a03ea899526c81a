"""SIMULATION of torch_npu.contrib."""
