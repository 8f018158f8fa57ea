"""Triton kernels behind the operators; importing them needs Triton."""
