"""Triton kernels for one token of each sequence: linear layers, attention and the mixer, each bound by what it reads.

On a GPU they replace a decoder layer's own modules for a step (``matvlm.generation.fused``), which elsewhere are what
runs. Imported only where Triton is: with a CUDA build of PyTorch, or in Triton's interpreter, which tests them.
"""
