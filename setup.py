"""Build of inverseq: the package and its one C++ extension. Metadata is in pyproject.toml; kernels/ is a distribution
of its own."""

from pybind11.setup_helpers import Pybind11Extension
from setuptools import find_packages, setup

packing = Pybind11Extension(
    "inverseq._packing",
    sources=["csrc/bindings.cpp", "csrc/pack_views.cpp", "csrc/plan_packs.cpp"],
    depends=["csrc/pack_views.hpp", "csrc/plan_packs.hpp"],
    include_dirs=["csrc"],
    cxx_std=17,
    extra_compile_args=["-O3", "-Wall", "-Wextra", "-Werror"],
)

setup(
    packages=find_packages(include=["inverseq", "inverseq.*"]),
    package_dir={"inverseq": "inverseq"},
    include_package_data=False,  # what package_data names and nothing else
    package_data={
        "inverseq": ["recipes/*.yaml", "principles/*.txt", "templates/*.jinja", "data/*.jsonl", "data/*.jsonl.gz"],
        "inverseq.evaluation": ["generate.yaml", "judge_prompts/*.txt"],
    },
    ext_modules=[packing],
)
