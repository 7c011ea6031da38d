"""Triton kernels, imported as pyattn.kernels (pyattn/kernels is a symbolic link to this folder)."""

if __name__ == "kernels":
    raise ImportError(
        "this folder holds pyattn's Triton kernels: import it as pyattn.kernels. "
        "If you meant the package of PyPI that is named kernels, run Python outside pyattn's source folder."
    )
