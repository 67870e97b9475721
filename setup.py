"""Packaging of llava_mcore; everything else about the project's tools stands in pyproject.toml."""

from setuptools import find_packages, setup

version: dict[str, str] = {}
with open("llava_mcore/__init__.py", encoding="utf-8") as source:
    exec(next(line for line in source if line.startswith("__version__")), version)

setup(
    name="llava_mcore",
    version=version["__version__"],
    description="LLaVA-style vision-language models on Megatron-Core, with the same numbers on a CPU and on a cluster",
    long_description=open("README.md", encoding="utf-8").read(),
    long_description_content_type="text/markdown",
    packages=find_packages(include=["llava_mcore*"]),
    package_data={"llava_mcore.configs": ["**/*.yaml"]},
    python_requires=">=3.11",
    # Lower bounds are what was tested (CPU: Python 3.11, torch 2.13); upper bounds stand where a package reaches into internals.
    install_requires=[
        "torch>=2.11,<2.14",
        "megatron-core==0.16.1",
        "numpy>=2.0",
        "psutil>=7.0",  # without it megatron-core's checkpoint writers wait for ever
        "safetensors>=0.5",
        "tokenizers>=0.21",
        "sentencepiece>=0.2",
        "webdataset==1.0.2",
        "Pillow>=11",
        "av>=18.1,<19",
        "jinja2>=3.1",
        "PyYAML>=6.0",
        "hydra-core==1.3.8",
        "pydantic>=2.11,<3",
        "tqdm>=4.66",
        "tensorboard>=2.18",
        "wandb>=0.19",
    ],
    extras_require={
        # Need nvcc and a CUDA torch to install; NVIDIA's Apex is used where importable and is not on PyPI.
        "gpu": ["transformer-engine[pytorch]>=2.9", "flash-attn>=2.7", "nvidia-dali-cuda130>=2.0"],
        "dev": [
            "transformers==5.23.0",
            "protobuf>=5",  # transformers reads tokenizer.model with it
            "nvidia-dali-cuda130==2.4.0",  # 0.6 GB; decodes pictures on a CPU too, and is optional at run time
            "scikit-learn>=1.6",
            "matplotlib>=3.10",
            "pytest>=8",
            "hypothesis>=6.100",
            "tomesd==0.1.3",
            "ruff>=0.9",
            "mypy>=1.14",
            "types-PyYAML",
        ],
    },
)
