"""SIMULATION of NVIDIA's Transformer Engine 2: what megatron.ops.engine_linear calls of its Python part."""
