from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="fastkd",
    version="0.1.0",
    description="Knowledge distillation of language models: fused losses over huge vocabularies,"
    " with exact gradients, for the trainers that people have and as a command",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="The fastkd authors",
    license="Apache-2.0",
    license_files=["LICENSE"],
    keywords=[
        "knowledge distillation",
        "language models",
        "pytorch",
        "triton",
        "transformers",
        "trl",
    ],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    python_requires=">=3.11",
    # kernels/ stays on top of the repository and is imported as fastkd.kernels (fastkd/kernels is a
    # link to it), without an __init__.py: the import name `kernels` belongs to another package.
    packages=[*find_packages(include=["fastkd", "fastkd.*"]), "fastkd.kernels"],
    # Said aloud, it makes an editable install a plain path. The finder that it would be instead
    # comes after the namespace package that a clone named fastkd is to a script beside it.
    package_dir={"": "."},
    package_data={"fastkd": ["py.typed"], "fastkd.demo": ["teacher/*"]},
    install_requires=["torch>=2.8"],
    extras_require={
        "triton": ["triton>=3.4"],  # the first with named tuples as a kernel's arguments
        "train": [
            "accelerate>=1.13",  # 1.6 does not resume exactly
            "datasets>=4.7",
            "jinja2>=3.1.6",
            "matplotlib>=3.8",
            "pyyaml>=6",
            "tqdm>=4.65",
            # Before 5.6 it divides accumulated gradients twice; 5.17 is the lowest run whole.
            "transformers>=5.17",
        ],
        "lora": ["peft>=0.18"],  # the first for transformers 5
        "qlora": ["bitsandbytes>=0.50", "peft>=0.18"],  # the version that was run
        "trl": ["trl>=1.16"],  # the first of which the replaced functions are known
        "docs": ["mkdocs-material>=9.6", "mkdocstrings[python]>=1.0"],
        "dev": [
            "hypothesis>=6.100",
            "lightning>=2.5",  # of an example
            "numpy>=1.26",  # of Triton's interpreter
            "pytest>=8",
            "pytest-benchmark>=4",
            "pytest-xdist>=3",
            "ruff>=0.8",
            "setuptools>=70.1",  # the first that needs no other package for wheels
        ],
    },
    entry_points={"console_scripts": ["fastkd = fastkd.cli:main"]},
)
