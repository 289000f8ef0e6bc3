"""The parts of the build that pyproject.toml cannot say: where the packages lie, and the native code.

`kernels/` is a folder of its own at the top and is installed as `tarflow_fast.kernels`.
"""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["tarflow_fast", "tarflow_fast.*"]), "tarflow_fast.kernels"],
    package_dir={"tarflow_fast": "tarflow_fast", "tarflow_fast.kernels": "kernels"},
    package_data={"tarflow_fast": ["py.typed", "pretrained/*"]},
    ext_modules=[],
)
