"""Triton kernels, one file per operation; installed as `hart_infer.kernels`.

Modules in this folder import torch and triton only, and know nothing of the package above them.
"""
