"""Simulated accelerators: torch devices `hpu`, `npu` and `neuron` without the hardware and the vendor's software.

They show that this project places its tensors rightly and calls the vendors' functions with the right names, arguments
and numbers. They show nothing about a real device's speed, memory, asynchrony or rounding.
See docs/simulated-devices.md.
"""
