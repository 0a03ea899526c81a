"""From `.bin/.idx` files to batches: readers and writers, sample orders, blends, samplers, loaders."""
