"""From environment variables and flags to the one command that starts a run."""
