"""Model parallelism: who holds what, and the collectives that make shards compute what one device would."""
