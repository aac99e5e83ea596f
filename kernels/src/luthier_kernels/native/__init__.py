"""The C sources of this package, compiled for this processor at first use and kept in the user's cache."""

from luthier_kernels.native.build import has_native, native_function
from luthier_kernels.native.parallel import run_parts

__all__ = ["has_native", "native_function", "run_parts"]
