"""
Print the lowest versions that pyproject.toml allows of what the package needs, one a line, as pip's constraints.

But for torch, of which the Makefile says which build it is.
"""

import re
import tomllib
from pathlib import Path

project = tomllib.loads(Path(__file__).parents[1].joinpath("pyproject.toml").read_text(encoding="utf-8"))["project"]
extras = project["optional-dependencies"]
for requirement in [*project["dependencies"], *extras["plots"], *extras["quantization"]]:
    name, version = re.match(r"([\w-]+)>=([\w.]+)", requirement).groups()
    if name != "torch":
        print(f"{name}=={version}")
