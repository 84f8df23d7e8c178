"""ALiBi attention in Triton kernels, for CUDA and ROCm."""
