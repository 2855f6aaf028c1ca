"""Build csrc with torch's extension tools if there are a C++ compiler and torch; otherwise print one sentence.

torch is not a build requirement, because an isolated build would download gigabytes, and possibly a different torch
from the one that later loads the extension. The build uses the torch of the target environment instead.
`--no-build-isolation` sees it anyway; pip's build isolation hides the packages of that environment, but runs its
Python, which still knows their folder. Without torch or a compiler the package installs without the extension and runs
slower.
"""

import os
import platform
import shutil
import sys
import sysconfig

from setuptools import setup

# csrc/rows.cpp and csrc/sparse.cpp are compiled once per set; the CPU decides at run time which one runs.
INSTRUCTION_SETS = {"DEFAULT": []}
if platform.machine() in ("x86_64", "AMD64"):
    INSTRUCTION_SETS["AVX2"] = ["-mavx2", "-mfma", "-mf16c"]
    INSTRUCTION_SETS["AVX512"] = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c"]
    INSTRUCTION_SETS["AVX512"] += [
        "-Wno-maybe-uninitialized",
        "-Wno-uninitialized",
    ]  # warnings of GCC 12 about its own avx512fintrin.h


def extension() -> dict:
    if not any(shutil.which(c) for c in (os.environ.get("CXX", "c++").split()[0], "g++", "clang++")):
        return without("there is no C++ compiler (on Debian: apt-get install g++)")
    sys.path.append(sysconfig.get_path("platlib"))
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError:
        return without("this environment has no torch (install it, then lead-fast again)")

    flags = ["-O3", "-g0", "-fvisibility=hidden", "-Wno-unknown-pragmas"]
    if sys.platform == "linux":
        flags.append("-fopenmp")  # not linked: torch brings the library, so that there is one pool of threads

    class Build(BuildExtension):
        def build_extension(self, ext) -> None:
            """Compile for every instruction set; a failure costs the extension, not the installation."""
            try:
                ext.extra_objects = []
                for name, instructions in INSTRUCTION_SETS.items():
                    ext.extra_objects += self.compiler.compile(
                        ["csrc/rows.cpp", "csrc/sparse.cpp"],
                        output_dir=os.path.join(self.build_temp, name),
                        include_dirs=ext.include_dirs,
                        extra_postargs=[*flags, f"-DCPU_CAPABILITY={name}", f"-DCPU_CAPABILITY_{name}", *instructions],
                        depends=ext.depends,
                    )
                super().build_extension(ext)
            except Exception as e:  # whatever the compiler and its tools raise
                without(f"compiling failed ({str(e).splitlines()[0] if str(e) else type(e).__name__})")

    module = CppExtension(
        "lead_kernels._C",
        ["csrc/bindings.cpp", "csrc/sparse_bindings.cpp", "csrc/lead_advantages.cpp", "csrc/row_loss.cpp"],
        extra_compile_args=flags,
        depends=["csrc/rows.cpp", "csrc/rows.h", "csrc/sparse.cpp", "csrc/sparse.h"],
        optional=True,  # a missing extension is not an error
    )
    return {"ext_modules": [module], "cmdclass": {"build_ext": Build}}


def without(reason: str) -> dict:
    print(f"lead-fast is built without its C++ kernels: {reason}. Everything runs, slower on a CPU.", file=sys.stderr)
    return {}


setup(**extension())
