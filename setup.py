"""The native CPU kernels; everything else is in pyproject.toml.

They are plain C++ behind a C ABI, loaded with ctypes: no torch is needed to build them. Without a compiler the
installation succeeds all the same, and the aten reference serves.
"""

from glob import glob

from setuptools import Extension, setup

CSRC = "llmquant/kernels/cpu/csrc"

NATIVE = Extension(
    "llmquant.kernels.cpu.native",
    sources=sorted(glob(f"{CSRC}/*.cpp")),
    depends=sorted(glob(f"{CSRC}/*.h")),
    # OpenMP is compiled in but not linked: its symbols bind to the runtime that torch has loaded, so that both share
    # one pool of threads.
    extra_compile_args=["-O3", "-std=c++17", "-fopenmp", "-Wno-maybe-uninitialized", "-Wno-uninitialized"],
    optional=True,
)

setup(ext_modules=[NATIVE])
