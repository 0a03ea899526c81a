"""SIMULATION of habana_frameworks for tests: names, signatures and argument rules over plain maths. Not Intel's."""
