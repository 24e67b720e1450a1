"""Build TorchRL's extension, which holds its sum trees, for the torch that is installed.

    python -m benchmarks.torchrl_extension

The one in its wheel loads with the torch that it was built with alone, and so prioritised replay would be left out. The
sources are in the wheel as well; without a compiler nothing is changed.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from torch.utils import cpp_extension

LOADS = "import torch, torchrl._torchrl"


def loads() -> bool:
    return subprocess.run([sys.executable, "-W", "ignore", "-c", LOADS], capture_output=True).returncode == 0


def build(folder: Path, compiler: str) -> None:
    """Compile what is in `folder`, that of the package, to where its extension is."""
    (extension,) = folder.glob("_torchrl*.so")
    source, built = folder / "csrc", extension.with_suffix(".new")
    includes = [str(source), str(folder.parent), *cpp_extension.include_paths(), sysconfig.get_path("include")]
    libraries = cpp_extension.library_paths()
    command = [compiler, "-O3", "-std=c++20", "-fPIC", "-shared", "-DTORCH_EXTENSION_NAME=_torchrl"]
    command += ["-DTORCH_API_INCLUDE_EXTENSION_H", *(f"-I{path}" for path in includes)]
    command += [*map(str, sorted(source.glob("*.cpp"))), "-o", str(built), *(f"-L{path}" for path in libraries)]
    subprocess.run([*command, "-ltorch", "-ltorch_cpu", "-lc10", "-ltorch_python"], check=True)
    built.replace(extension)


def main() -> None:
    spec, compiler = importlib.util.find_spec("torchrl"), shutil.which("c++")
    if spec is None or spec.origin is None or compiler is None or loads():
        return
    build(Path(spec.origin).parent, compiler)
    if not loads():
        raise SystemExit("TorchRL's extension was built, and still does not load")


if __name__ == "__main__":
    main()
