"""SIMULATION of the package that Gaudi's software brings its profiler in."""
