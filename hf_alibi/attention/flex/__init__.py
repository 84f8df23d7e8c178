"""Attention by `flex_attention`, which compiles a kernel for the mask at hand."""
