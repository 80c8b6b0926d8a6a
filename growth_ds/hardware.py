"""GPUs and the ways between them, as their makers state them: what a forecast divides by."""

from __future__ import annotations

import re
from dataclasses import dataclass

from growth_ds.errors import UserError


@dataclass(frozen=True)
class Gpu:
    """One board. Peaks are dense, without sparsity; from the maker's data sheet of the SXM board where there is one."""

    matrix: dict[str, float]
    """Precision -> floating-point operations a second of matrix products, accumulated in fp32."""
    memory_bandwidth: float
    """Bytes a second."""
    memory: int
    """Bytes."""
    link: float
    """Bytes a second to the other GPUs of its node, one way: NVLink, or PCIe where there is none."""
    watts: float
    """Limit of the board."""


def _gpu(bf16: float, fp32: float, bandwidth: float, gb: float, link: float, watts: float, fp8: float = 0.0) -> Gpu:
    """In TFLOP/s, TB/s, GB, GB/s, W."""
    matrix = {"bf16": bf16 * 1e12, "fp16": bf16 * 1e12, "fp32": fp32 * 1e12}
    if fp8:
        matrix["fp8"] = fp8 * 1e12
    return Gpu(matrix, bandwidth * 1e12, round(gb * 1e9), link * 1e9, watts)


GPUS = {
    "v100": _gpu(125, 15.7, 0.9, 32, 150, 300),  # it has fp16 alone
    "a100-40": _gpu(312, 19.5, 1.555, 40, 300, 400),
    "a100": _gpu(312, 19.5, 2.039, 80, 300, 400),
    "l40s": _gpu(362, 91.6, 0.864, 48, 32, 350, fp8=733),
    "h100": _gpu(989, 66.9, 3.35, 80, 450, 700, fp8=1979),
    "h200": _gpu(989, 66.9, 4.8, 141, 450, 700, fp8=1979),
    "b200": _gpu(2250, 80, 8.0, 180, 900, 1000, fp8=4500),
}


@dataclass(frozen=True)
class Cluster:
    """Equal nodes of equal GPUs."""

    name: str
    gpu: Gpu
    nodes: int
    per_node: int
    network: float
    """Bytes a second out of a node for each of its GPUs, one way."""

    @property
    def ranks(self) -> int:
        """GPUs in all."""
        return self.nodes * self.per_node


def cluster(hardware: str, nodes: int, per_node: int, interconnect: str | None) -> Cluster:
    """What the options of `growth-ds plan` name. Raises UserError for a GPU or a network that is none of them."""
    if hardware not in GPUS:
        raise UserError(f"--hardware: '{hardware}' is unknown; give one of {', '.join(GPUS)}")
    if nodes > 1 and interconnect is None:
        raise UserError("--interconnect: not given; say what joins the nodes, for example 400g for each GPU")
    network = bandwidth(interconnect, per_node) if interconnect is not None else 0.0
    return Cluster(hardware, GPUS[hardware], nodes, per_node, network)


def bandwidth(interconnect: str, per_node: int) -> float:
    """Bytes a second for each GPU: `400g` is bits for each GPU's own link, `8x100g` what all GPUs of a node share."""
    match = re.fullmatch(r"(?:([1-9]\d*)x)?(\d+(?:\.\d+)?)([gmGM])", interconnect)
    if match is None or float(match[2]) <= 0:
        raise UserError(
            f"--interconnect: '{interconnect}' is no bandwidth; give bits a second for each GPU (400g), or the links "
            "of a node (8x100g)"
        )
    link = float(match[2]) * (1e9 if match[3] in "gG" else 1e6) / 8
    return link if match[1] is None else link * int(match[1]) / per_node
