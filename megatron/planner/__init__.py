"""What a training run will need and how long a step will take, computed before anything is started."""
