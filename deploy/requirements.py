"""What a cluster's nodes need installed, from pyproject.toml: `python deploy/requirements.py pyproject.toml`.

All but flopeq itself, whose code comes with each job.
"""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path


def requirements(pyproject: Path) -> list[str]:
    project = tomllib.loads(pyproject.read_text())["project"]
    extras = project["optional-dependencies"]
    return [*project["dependencies"], *extras["pipeline"], *extras["s3"]]


if __name__ == "__main__":
    print("\n".join(requirements(Path(sys.argv[1]))))
