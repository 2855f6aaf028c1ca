"""Builds csrc with torch's extension tools where there is a compiler and torch; says in a sentence if not.

torch is no build requirement, so that building never fetches gigabytes: build with `--no-build-isolation`, where the
installed torch is seen. Without torch or a compiler the package installs without the extension and runs slower.
"""

import shutil
import sys

from setuptools import setup


def extensions() -> dict:
    if not (shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")):
        return without("no C++ compiler was found (on Debian: apt-get install g++)")
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError:
        return without("torch is not visible to the build (install it, then pip install --no-build-isolation .)")

    class Build(BuildExtension):
        """A failed compilation costs the extension, not the installation."""

        def run(self) -> None:
            try:
                super().run()
            except Exception as e:  # whatever the compiler or its tools raise
                without(f"compiling failed ({type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''})")
                self.extensions = []

        def copy_extensions_to_source(self) -> None:
            if self.extensions:
                super().copy_extensions_to_source()

    flags = ["-O3", "-std=c++17", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden"]
    sources = ["csrc/bindings.cpp", "csrc/rows.cpp"]
    return {
        "ext_modules": [CppExtension("lead_kernels._C", sources, extra_compile_args=flags, depends=["csrc/rows.h"])],
        "cmdclass": {"build_ext": Build},
    }


def without(reason: str) -> dict:
    print(f"lead-fast is built without its C++ kernels: {reason}. Everything runs, slower on a CPU.", file=sys.stderr)
    return {}


setup(**extensions())
