"""Package, console script, dependencies and fused ops. `pip install torch==<pin>` first: see constraints.txt."""

import re
import sys
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE / "csrc"))
from build_ops import BuildOps, extensions  # noqa: E402

VERSION = re.search(r'__version__ = "([^"]+)"', (HERE / "growth_ds/__init__.py").read_text(encoding="utf-8")).group(1)
CORE = [
    "torch>=2.10",
    "deepspeed>=0.19",
    "megatron-core>=0.16",
    "sentencepiece>=0.2",
    "transformers>=4.51",
    "tokenizers>=0.21",
    "safetensors>=0.5",
    "numpy>=1.26",
    "pydantic>=2.7",
    "typer>=0.15",
    "rich>=13",
    "PyYAML>=6",
    "psutil>=5.9",
    "matplotlib>=3.8",
    "tensorboard>=2.15",
    "zstandard>=0.22",
]
EVALUATE = ["scikit-learn>=1.4", "scipy>=1.11"]  # `evaluate --task` alone
DEV = ["pytest>=8", "hypothesis>=6.100", "ruff>=0.9", "mypy>=1.13", "types-PyYAML", "types-psutil", "pdoc>=15"]
EXTRAS = {
    "mpi": ["mpi4py>=4"],
    "wandb": ["wandb>=0.17"],
    "mlflow": ["mlflow>=2.14"],
    "datasets": ["datasets>=3"],
    "evaluate": EVALUATE,
    "dev": [*EVALUATE, *DEV],
}

setup(
    name="growth_ds",
    version=VERSION,
    description="Progressive-growth pre-training of BERT on DeepSpeed",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=[*find_packages(include=["growth_ds", "growth_ds.*"]), "growth_ds.configs"],
    package_dir={"growth_ds.configs": "configs"},
    package_data={
        "growth_ds.configs": ["*/*.yaml", "*/*.json"],
        "growth_ds": ["py.typed", "*/README.md", "*/*/README.md"],
    },
    install_requires=CORE,
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildOps},
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["growth-ds=growth_ds.cli:main"]},
)
