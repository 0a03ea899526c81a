"""Settings of a run: frozen dataclasses that are also the command line. Standard library only."""
