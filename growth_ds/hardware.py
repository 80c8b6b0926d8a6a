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
    interconnect: str | None = None
    """What joins the maker's own nodes (DGX), for each GPU; None where it makes none."""


def _gpu(
    bf16: float, fp32: float, bandwidth: float, gb: float, link: float, watts: float, interconnect: str | None,
    fp8: float = 0.0,
) -> Gpu:  # fmt: skip
    """In TFLOP/s, TB/s, GB, GB/s, W."""
    matrix = {"bf16": bf16 * 1e12, "fp16": bf16 * 1e12, "fp32": fp32 * 1e12}
    if fp8:
        matrix["fp8"] = fp8 * 1e12
    return Gpu(matrix, bandwidth * 1e12, round(gb * 1e9), link * 1e9, watts, interconnect)


GPUS = {
    "v100": _gpu(125, 15.7, 0.9, 32, 150, 300, "50g"),  # it has fp16 alone
    "a100-40": _gpu(312, 19.5, 1.555, 40, 300, 400, "200g"),
    "a100": _gpu(312, 19.5, 2.039, 80, 300, 400, "200g"),
    "l40s": _gpu(362, 91.6, 0.864, 48, 32, 350, None, fp8=733),
    "h100": _gpu(989, 66.9, 3.35, 80, 450, 700, "400g", fp8=1979),
    "h200": _gpu(989, 66.9, 4.8, 141, 450, 700, "400g", fp8=1979),
    "b200": _gpu(2250, 80, 8.0, 180, 900, 1000, "400g", fp8=4500),
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
    """What the options of `growth-ds plan` name; several nodes without an interconnect have their maker's own.

    Raises UserError for a GPU or a network that is none of them.
    """
    if hardware not in GPUS:
        raise UserError(f"--hardware: '{hardware}' is unknown; give here, or one of {', '.join(GPUS)}")
    gpu = GPUS[hardware]
    joined = interconnect or gpu.interconnect
    if nodes > 1 and joined is None:
        raise UserError("--interconnect: not given; say what joins the nodes, for example 400g for each GPU")
    named = interconnect if nodes == 1 else joined
    return Cluster(hardware, gpu, nodes, per_node, 0.0 if named is None else bandwidth(named, per_node))


def nodes_of(gpus: int | None, nodes: int | None, per_node: int | None) -> tuple[int, int]:
    """(nodes, GPUs of each) that --gpus, --nodes and --gpus-per-node mean; eight to a node where nothing is said.

    Raises UserError where they contradict each other.
    """
    if gpus is None:
        return nodes or 1, per_node or 8
    if nodes is not None and per_node is None:
        per_node = gpus // nodes
    per_node = per_node or min(gpus, 8)
    if gpus % per_node or (nodes is not None and nodes * per_node != gpus) or not per_node:
        raise UserError(f"--gpus: {gpus} are not equal nodes of these; give --nodes and --gpus-per-node alone")
    return gpus // per_node, per_node


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
