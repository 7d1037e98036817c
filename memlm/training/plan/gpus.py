"""What the data sheets of GPUs say, and of the machines that hold them."""

import dataclasses

from memlm.errors import UserError, nearest
from memlm.training.throughput import peak_flops

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Gpu:
    """A GPU in a machine.

    Attributes:
        device: the name that it gives itself, by which `memlm.training.throughput` finds its peak.
        memory: GiB that CUDA reports of it.
        bandwidth: of its memory, GB/s.
        link: to the others of its machine, GB/s in one direction.
        network: to other machines, GB/s in one direction, of each GPU.
    """

    device: str
    memory: float
    bandwidth: float
    link: float
    network: float

    def peak(self, mixed_precision: str) -> float:
        """Dense FLOP/s of matrix products, of bfloat16 or TF32 numbers."""
        found = peak_flops(self.device, mixed_precision)
        assert found is not None, self.device
        return found


# Memory and bandwidths: NVIDIA's data sheets of the A100 (2021), H100 (2023), H200 (2024), L40S and
# L4 (2023), the DGX B200 (2024), and the GeForce RTX 4090; AMD's of the MI300X (2023). NVLink and
# Infinity Fabric are half of what they give for both directions; cards without have PCI Express 4,
# 16 lanes. Networks: one adapter per GPU as in the DGX A100 (200 Gb/s), H100, H200 and B200
# (400 Gb/s) and in machines with eight MI300X (400 Gb/s); 100 Gb/s are assumed for the others.
GPUS = {
    "a100-40": Gpu("NVIDIA A100-SXM4-40GB", 39.4, 1555, 300, 25),
    "a100": Gpu("NVIDIA A100-SXM4-80GB", 79.2, 2039, 300, 25),
    "h100": Gpu("NVIDIA H100 80GB HBM3", 79.2, 3350, 450, 50),
    "h200": Gpu("NVIDIA H200", 139.8, 4800, 450, 50),
    "b200": Gpu("NVIDIA B200", 178.3, 8000, 900, 50),
    "l40s": Gpu("NVIDIA L40S", 44.4, 864, 32, 12.5),
    "l4": Gpu("NVIDIA L4", 22.0, 300, 32, 12.5),
    "rtx4090": Gpu("NVIDIA GeForce RTX 4090", 23.5, 1008, 32, 12.5),
    "mi300x": Gpu("AMD Instinct MI300X", 191.5, 5300, 448, 50),
}


def find_gpu(name: str) -> Gpu:
    """The GPU of this name.

    Raises:
        UserError: for another name; it tells the nearest.
    """
    found = GPUS.get(name.lower())
    if found is None:
        valid = nearest(name.lower(), GPUS) or ""
        raise UserError(f"--gpu: unknown GPU {name!r}{valid} (valid: {', '.join(GPUS)})")
    return found


@dataclasses.dataclass(frozen=True)
class Cluster:
    """GPUs, and what of their data sheets a run is assumed to reach.

    Attributes:
        gpu: their kind.
        count: all of them, one process each.
        per_node: of one machine.
        compute_share: of the peak of matrix products.
        transfer_share: of the bandwidths.
    """

    gpu: Gpu
    count: int
    per_node: int = 8
    compute_share: float = 0.4
    transfer_share: float = 0.8

    @property
    def nodes(self) -> int:
        return -(-self.count // self.per_node)

    def collective_seconds(self, payload: float, processes: int, passes: int = 1) -> float:
        """Of a ring over neighbouring processes, as NCCL's: an all-gather, or a reduce-scatter.

        Args:
            payload: bytes of the whole tensor.
            processes: that take part.
            passes: 2 for an all-reduce.
        """
        nodes = -(-processes // self.per_node)
        within = payload * (processes - 1) / processes / (self.gpu.link * 1e9)
        # All adapters of a machine bring it what the other machines have.
        adapters = min(processes, self.per_node) * self.gpu.network * 1e9
        between = payload * (nodes - 1) / nodes / adapters
        return passes * max(within, between) / self.transfer_share

    def exchange_seconds(self, received: float, processes: int) -> float:
        """Of an exchange of each process with each, `received` bytes by each."""
        inside = min(processes, self.per_node)
        others = max(1, processes - 1)
        within = received * (inside - 1) / others / (self.gpu.link * 1e9)
        between = received * (processes - inside) / others / (self.gpu.network * 1e9)
        return (within + between) / self.transfer_share

    def memory_seconds(self, moved: float) -> float:
        """Of reading and writing `moved` bytes of the GPU's memory."""
        return moved / (self.gpu.bandwidth * 1e9 * self.transfer_share)
