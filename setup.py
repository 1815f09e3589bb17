"""What pyproject.toml cannot say: the C++ kernels of csrc/cpu, where they can be built.

They need a C++ compiler and the headers of the CPU build of torch that they will run with: so the
build must see the environment (pip install --no-build-isolation). Elsewhere the package is pure
Python, and engines on a CPU run the definitions in torch.

Each library holds all kernels for one kind of CPU, and the one that torch names is loaded
(specontext_vllm/cpu_kernels): so a wheel runs on other CPUs than that it was built on, which
-march=native would not allow. Torch is looked at, not imported, which takes seconds in each of the
many runs of this file that one installation comes to.

triton_kernels/ and configs/ stand at the top of the repository and are linked into the package, so
that they are importable as ``specontext_vllm.triton_kernels`` and ``specontext_vllm.configs`` from
a checkout, an editable install and a wheel alike.
"""

import copy
import os
import platform
import runpy
import shutil
from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

SOURCES = sorted(str(path) for path in Path("csrc/cpu").glob("*.cpp"))
HEADERS = sorted(str(path) for path in Path("csrc/cpu").glob("*.h"))
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
CAPABILITIES = {"x86_64": {"avx2": AVX2, "avx512": AVX512}}
"""For each machine, the kinds of CPU by torch's names, and the compiler's flags for them. Torch's
vectors know what any other machine has from the compiler alone."""


def torch_version(torch: Path) -> dict:
    """What torch/version.py defines."""
    return runpy.run_path(str(torch / "version.py"))


def kernels() -> list[Extension]:
    """The libraries to build; none where something is missing."""
    compiler = os.environ.get("CXX", "c++").split()[0]
    spec = find_spec("torch")
    if spec is None or spec.origin is None or shutil.which(compiler) is None:
        missing = f"a C++ compiler ({compiler})" if spec else "torch, which this build does not see"
        print(f"specontext-vllm: no kernels for CPUs are built, since there is no {missing}.")
        return []
    torch = Path(spec.origin).parent
    version = torch_version(torch)
    if version.get("cuda") or version.get("hip"):
        print("specontext-vllm: no kernels for CPUs are built, since torch is a build for GPUs.")
        return []
    include = torch / "include"
    short = "_".join(version["__version__"].split(".")[:2])
    return [
        Extension(
            f"specontext_vllm.cpu_kernels.{name}-torch{short}",
            SOURCES,
            depends=[*HEADERS, "setup.py"],
            include_dirs=[str(include), str(include / "torch/csrc/api/include")],
            define_macros=[
                ("CPU_CAPABILITY", name.upper()),
                (f"CPU_CAPABILITY_{name.upper()}", ""),
            ],
            extra_compile_args=["-std=c++20", "-O3", "-g0", "-fopenmp", *flags],
            extra_link_args=["-fopenmp"],
            library_dirs=[str(torch / "lib")],
            libraries=["c10", "torch_cpu"],
            language="c++",
            # Where it does not compile the package installs without it.
            optional=True,
        )
        for name, flags in CAPABILITIES.get(platform.machine(), {"default": []}).items()
    ]


class BuildKernels(build_ext):
    """All libraries at once, and nothing that a checkout has already."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.parallel = self.parallel or os.cpu_count()

    def get_ext_filename(self, fullname: str) -> str:
        # No Python in them: neither its version nor its ABI matters.
        package, _, name = fullname.partition(".cpu_kernels.")
        return os.path.join(package, "cpu_kernels", f"{name}.so") if name else f"{package}.so"

    def build_extension(self, ext: Extension) -> None:
        # An editable install builds in a folder that is new each time.
        built, wanted = Path(self.get_ext_filename(ext.name)), self.get_ext_fullpath(ext.name)
        inputs = [Path(name) for name in (*ext.sources, *ext.depends)]
        if built.exists() and built.stat().st_mtime > max(p.stat().st_mtime for p in inputs):
            Path(wanted).parent.mkdir(parents=True, exist_ok=True)
            if Path(wanted).resolve() != built.resolve():
                shutil.copy2(built, wanted)
            return
        # Objects of the same sources, compiled otherwise.
        alone = copy.copy(self)
        alone.build_temp = os.path.join(self.build_temp, ext.name)
        build_ext.build_extension(alone, ext)


setup(ext_modules=kernels(), cmdclass={"build_ext": BuildKernels})
