"""Triton kernels, each beside the plain torch function that it must equal; imported only where CUDA is used."""
