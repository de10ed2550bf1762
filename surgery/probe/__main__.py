"""The script: hide surgery, load this folder under a name of its own, run the job."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path


def main() -> None:
    """Run the checks of jobs; the command line has the file of each, and behind it that to write its result to."""
    sys.modules["surgery"] = None  # type: ignore[assignment]  # every import of surgery now fails, installed or not
    here = Path(__file__).resolve().parent
    sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != here]  # else loading.py shadows others
    spec = importlib.util.spec_from_file_location("surgery_probe", here / "__init__.py")
    if spec is None or spec.loader is None:
        raise ImportError(f"{here} cannot be loaded")
    package = importlib.util.module_from_spec(spec)
    sys.modules["surgery_probe"] = package
    spec.loader.exec_module(package)
    run = importlib.import_module("surgery_probe.running").run
    for job, result in zip(sys.argv[1::2], sys.argv[2::2], strict=True):
        run(Path(job), Path(result))


if __name__ == "__main__":
    main()
