"""Package metadata. On a machine without a GPU install from requirements-cpu.lock instead (`make setup`)."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent


def version() -> str:
    text = (ROOT / "opd" / "__init__.py").read_text(encoding="utf-8")
    return re.search(r'^__version__ = "(.+)"$', text, re.MULTILINE).group(1)


def long_description() -> str:
    readme = ROOT / "README.md"
    return readme.read_text(encoding="utf-8") if readme.exists() else ""


TRAINING = ["megatron-core==0.16.1", "mbridge==0.15.1", "ray>=2.40"]

setup(
    name="opd",
    version=version(),
    description="On-policy distillation of language models on Megatron-core and SGLang",
    long_description=long_description(),
    long_description_content_type="text/markdown",
    packages=find_packages(include=["opd", "opd.*"]),
    package_data={"opd.report": ["page/*"]},
    entry_points={"console_scripts": ["opd-train = opd.cli:main"]},  # in a checkout: python train.py
    python_requires=">=3.11",
    install_requires=[
        "aiohttp",
        "einops",  # megatron-core imports it
        "numpy",
        "packaging",
        "psutil",  # without it a Megatron checkpoint save hangs
        "pyarrow",
        "pyyaml",
        "rich",
        "safetensors",
        "tenacity",
        "torch>=2.8",
        "transformers>=5",
    ],
    extras_require={
        "cpu": TRAINING,  # SGLang on a CPU needs the lock: its metadata pulls CUDA-only packages
        "gpu": [*TRAINING, "sglang==0.5.23", "sglang-router==0.3.2"],
        "report": ["matplotlib", "prometheus_client", "tensorboard"],
        "math": ["math-verify"],
        "wandb": ["wandb"],
        "dev": [
            "coverage",
            "hypothesis",
            "matplotlib",
            "math-verify",
            "mypy",
            "prometheus_client",
            "pytest",
            "pytest-timeout",
            "pytest-xdist",
            "ruff",
            "tensorboard",
        ],
    },
    classifiers=[
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
