"""Measurements on a GPU, in one command: `make gpu`, or `python -m benchmarks.gpu`.

Models have real shapes and random weights, made on the spot: nothing is downloaded. Such a model tells memory, speed
and mechanics, not learning. The work is cut into parts, and each part into cells that run in processes of their own
(`parts.py` lists them); `runner.py` says how results are kept and continued.
"""
