"""Compiles the CPU's kernels, and keeps them beside the package where that can be written.

    python -m ties_ray.kernels [--levels]

`--levels` compiles for the lower levels of processors as well. An image is then ready for nodes of each.
"""

import os
import subprocess
import sys
from contextlib import suppress

from ties_ray.kernels import code_folders
from ties_ray.kernels.compiling import levels

PROGRAM = "import ties_ray.kernels.cpu, ties_ray.kernels.exact_sums, ties_ray.kernels.terms"


def main() -> None:
    """Compile in processes of their own, and say where the code lies."""
    names = [{"NUMBA_CPU_NAME": level} for level in levels()] if "--levels" in sys.argv[1:] else [{}]
    for name in names:
        subprocess.run([sys.executable, "-c", PROGRAM], check=True, env=os.environ | name)
    place = code_folders.own()
    with suppress(OSError):
        code_folders.BESIDE.mkdir(mode=0o755, exist_ok=True)
        for file in place.glob(f"*{code_folders.SUFFIX}"):
            code_folders.write(code_folders.BESIDE, file.name, file.read_bytes())
        place = code_folders.BESIDE
    print(f"compiled kernels: {place}")


if __name__ == "__main__":
    main()
