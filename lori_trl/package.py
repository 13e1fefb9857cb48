"""This package: where it is to be had."""

from importlib.metadata import PackageNotFoundError, metadata


def install_command() -> str | None:
    """
    Return the command that installs the package from its repository, as `[project.urls]` of pyproject.toml names it;
    `None` in a source tree that is not installed.
    """
    try:
        urls = dict(line.split(", ", 1) for line in metadata("lori-trl").get_all("Project-URL", []))
    except PackageNotFoundError:
        return None
    return f"pip install git+{urls['Repository']}" if "Repository" in urls else None
