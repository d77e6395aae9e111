"""The part of the build that pyproject.toml can't say: `kernels/` is installed inside the package."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["hart_infer", "hart_infer.*"]), "hart_infer.kernels"],
    package_dir={"hart_infer.kernels": "kernels"},
)
