from pathlib import Path

from setuptools import setup

setup(
    name="fastkd",
    version="0.1.0",
    description="Fused knowledge-distillation losses over huge vocabularies, with exact gradients",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    # kernels/ stays on top of the repository and is imported as fastkd.kernels (fastkd/kernels is a
    # link to it): the import name `kernels` belongs to another package.
    packages=[
        "fastkd",
        "fastkd.backends",
        "fastkd.demo",
        "fastkd.integrations",
        "fastkd.kernels",
        "fastkd.recipes",
        "fastkd.training",
    ],
    package_dir={"fastkd.kernels": "kernels"},
    package_data={"fastkd": ["py.typed"], "fastkd.demo": ["teacher/*"]},
    install_requires=["torch>=2.6"],
    extras_require={
        "triton": ["triton>=3.3"],
        "train": [
            "accelerate>=1.2",
            "datasets>=3.0",
            "matplotlib>=3.8",
            "pyyaml>=6",
            "tqdm>=4.65",
            "transformers>=5.0",
        ],
        "lora": ["peft>=0.15"],
        "dev": [
            "hypothesis>=6.100",
            "pytest>=8",
            "pytest-benchmark>=4",
            "pytest-xdist>=3",
            "ruff>=0.8",
        ],
    },
    entry_points={"console_scripts": ["fastkd = fastkd.cli:main"]},
)
