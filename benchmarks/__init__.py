"""Speed and memory against peers and plain twins; each module is a command."""
