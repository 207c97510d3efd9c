"""Measures FLOPs, throughput and profiles, and compares them with the paper's Table 1."""
