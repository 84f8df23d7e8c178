"""Attention by torch's fused kernels: `dispatch` picks the cheapest exact path."""
