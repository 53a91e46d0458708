"""Package metadata of amid_trl; tool settings are in pyproject.toml, tested pins in constraints.txt."""

import re
from pathlib import Path

from setuptools import find_packages, setup


PACKAGE = Path(__file__).with_name("amid_trl")
VERSION = re.search(r'^__version__ = "(.+)"', (PACKAGE / "__init__.py").read_text(encoding="utf-8"), re.MULTILINE)[1]
EXTRAS = {
    "deepspeed": ["deepspeed>=0.19", "ninja"],
    "vllm": ["vllm<0.31"],
    "quantization": ["bitsandbytes>=0.46"],
    "eval": ["rouge-score"],
    "eval-harness": ["lm-eval"],  # apart from eval: 300 MB, with scikit-learn
    "plot": ["jinja2", "matplotlib"],
    "serve": ["starlette", "uvicorn"],
    "notebook": ["ipykernel", "ipywidgets", "matplotlib"],
    "compare": ["matplotlib", "scipy>=1.15"],
    "sweep": ["optuna>=5"],
    "ray": ["optuna>=5", "ray[tune]>=2.50"],  # apart from sweep: 250 MB
    "trackers": ["tensorboard", "trackio", "wandb"],  # test has the first: TRL imports the others at each start
    "docs": ["mkdocs>=1.6,<2", "mkdocs-material", "mkdocstrings[python]"],
}
TEST = [
    "axe-playwright-python",  # with playwright, which drives a Chromium that the machine has, or nothing
    "beartype",
    "hypothesis",
    "jaxtyping",
    "mpmath",
    "nbclient",
    "playwright",
    "pyright",
    "pytest",
    "pytest-timeout",
    "pytest-xdist",
    "ruff",
    "tensorboard",
    *EXTRAS["deepspeed"],
    *EXTRAS["eval"],
    *EXTRAS["compare"],
    *EXTRAS["docs"],
    *EXTRAS["notebook"],
    *EXTRAS["plot"],
    *EXTRAS["quantization"],
    *EXTRAS["serve"],
    *EXTRAS["sweep"],
]
# What the demo reads besides the two data wheels, which the Makefile installs without their own dependencies.
DEMO = ["gguf", "pyyaml", *EXTRAS["eval"], *EXTRAS["plot"]]

setup(
    name="amid_trl",
    version=VERSION,
    description="Distil language models with TRL through an α-mixture assistant distribution (AMiD, ICLR 2026).",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=find_packages(include=["amid_trl", "amid_trl.*"]),
    package_data={
        "amid_trl": ["py.typed"],
        "amid_trl.launch.accelerate_configs": ["*.yaml"],
        "amid_trl.evaluation.sets": ["*.yaml"],
        "amid_trl.launch.recipes": ["*.yaml"],
        "amid_trl.report": ["page.html"],
    },
    install_requires=[
        "torch>=2.7",
        "transformers>=5.19,<6",
        "trl>=1.16,<1.17",  # trl.experimental, which holds GKDTrainer, moves between minor versions
        "accelerate>=1.10.1",
        # Older ones lose the rest of a stream that is resumed: where it is mapped before 4.8, filtered before 5.0.1,
        # cut with skip() and take() in 5.0.1.
        "datasets>=5.1.0",
        "peft>=0.18",
        "jaxtyping",
        "urllib3>=2.0.2",  # 2.0.0 is yanked: it cuts short what it streams
    ],
    extras_require={**EXTRAS, "demo": DEMO, "test": TEST, "dev": sorted({*TEST, *DEMO})},
    entry_points={"console_scripts": ["amid-trl=amid_trl.cli:main"]},
    classifiers=[
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
