"""Triton kernels, a file for each op, with private files beside it where one would be too long. The folder is installed
as `fastapd.kernels`, never under its own name."""

if __name__ != "fastapd.kernels":
    # From the repository root this folder hides the `kernels` package of PyPI; say so instead of half working.
    raise ImportError(
        f"kernels: the module must be imported as fastapd.kernels, got {__name__}; this folder holds fastapd's Triton "
        "kernels, so run from another directory (or with python -P) if you meant another package of that name"
    )
