"""The models: one decoder-only transformer of plain parts, computing on local tensors."""
