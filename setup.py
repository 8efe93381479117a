"""Compiles the kernels at install time where torch can be imported; everything else is in pyproject.toml.

The CUDA kernels are compiled where torch is built for CUDA and nvcc is found, the CPU's always.

An isolated build sees no torch: the wheel is then pure Python, and the kernels are compiled at their first use. The
same happens where there is no compiler, or compiling fails: an install never does. ``LBR_KERNELS_FORCE_BUILD=1`` turns
all of these into errors.
"""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from setuptools import setup


def extension_module() -> ModuleType:
    """``lbr_kernels/ops/_extension.py`` alone, without the package, which would import torch."""
    path = Path(__file__).parent / "lbr_kernels" / "ops" / "_extension.py"
    spec = importlib.util.spec_from_file_location("_extension", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def build_arguments() -> dict[str, Any]:
    """What ``setup`` needs to compile the kernels; nothing where torch is missing."""
    extension = extension_module()
    forced = extension.build_is_forced()
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension
    except ImportError as error:
        if forced:
            raise RuntimeError(
                "LBR_KERNELS_FORCE_BUILD=1, but torch cannot be imported here; install it and use --no-build-isolation"
            ) from error
        return {}
    if (missing := extension.missing_compiler()) is not None:
        if forced:
            raise RuntimeError(f"LBR_KERNELS_FORCE_BUILD=1, but {missing}")
        return {}

    class OptionalBuild(BuildExtension):
        def build_extensions(self) -> None:
            """One by one: what cannot be compiled now does not keep the others from it."""
            built, extensions = [], list(self.distribution.ext_modules or [])
            for one in extensions:
                self.extensions = [one]
                try:
                    super().build_extensions()
                    built.append(one)
                except Exception as error:
                    if forced:
                        raise
                    print(
                        f"lbr_kernels: {one.name} not compiled now ({error}); it will be at first use", file=sys.stderr
                    )
            self.extensions = built

    root = Path(__file__).parent.resolve()

    def compiled(make: Any, library: Any) -> Any:
        return make(
            f"lbr_kernels.{library.name()}",
            [str(path.relative_to(root)) for path in library.sources()],
            extra_compile_args={
                "cxx": library.cxx_flags(),
                "nvcc": [*library.nvcc_flags(), *library.architecture_flags()],
            },
            extra_link_args=extension.link_flags(),
            py_limited_api=True,
            optional=not forced,
        )

    modules = [compiled(CppExtension, extension.CPU)]
    if extension.missing_cuda_compiler() is None:
        modules.append(compiled(CUDAExtension, extension.CUDA))
    return {
        "ext_modules": modules,
        "cmdclass": {"build_ext": OptionalBuild},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


setup(**build_arguments())
