"""Import it before anything that imports Triton: without a GPU, Triton's interpreter then runs the kernels."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
