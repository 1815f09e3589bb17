"""What pyproject.toml cannot say: nothing yet; compiled extensions (csrc/) are built here.

triton_kernels/ and configs/ stand at the top of the repository and are linked into the package, so
that they are importable as ``specontext_vllm.triton_kernels`` and ``specontext_vllm.configs`` from
a checkout, an editable install and a wheel alike.
"""

from setuptools import setup

setup()
