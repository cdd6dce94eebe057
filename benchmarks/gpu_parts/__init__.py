"""The parts of `benchmarks/gpu.py`: a part is a list of measurements, a measurement a name and a function."""
