"""Devices, precision, processes and determinism."""

from __future__ import annotations

import atexit
import ctypes
import inspect
import os
import platform
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from lightning_fabric import Fabric
from lightning_fabric.plugins import MixedPrecision
from lightning_fabric.strategies import DDPStrategy, ModelParallelStrategy
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from pynar.training.config import TrainingConfig

__all__ = ["determinism", "keep_freed_memory", "make_fabric"]

MIXED: dict[str, Literal["bf16-mixed", "16-mixed"]] = {"bf16": "bf16-mixed", "fp16": "16-mixed"}


def make_fabric(config: TrainingConfig) -> Fabric:
    """Fabric on one device, or on that of each process of `torchrun`."""
    accelerator = config.device
    if accelerator == "auto":
        accelerator = "cuda" if torch.cuda.is_available() else "cpu"
    elif accelerator == "cuda" and not torch.cuda.is_available():
        raise ValueError("`device: cuda` needs a CUDA device, and PyTorch finds none; use `cpu`")
    settings: dict[str, Any] = {"accelerator": accelerator}
    precision = config.precision
    if precision == "auto":
        precision = precision_on(accelerator)
    elif precision == "bf16" and precision_on(accelerator) != "bf16":
        warnings.warn(
            f"`precision: bf16` on a {accelerator} that only emulates it can be many times slower "
            "than fp32; `precision: auto` takes what is fast",
            stacklevel=2,
        )
    if precision in MIXED:
        # As a plugin: by its name Fabric would turn fp16 into bf16 on a CPU.
        settings["plugins"] = [MixedPrecision(MIXED[precision], device=accelerator)]
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return Fabric(devices=1, **settings)
    local, world = int(os.environ["LOCAL_WORLD_SIZE"]), int(os.environ["WORLD_SIZE"])
    strategy = _ddp() if config.parallel == "ddp" else _fsdp(world)
    fabric = Fabric(devices=local, num_nodes=world // local, strategy=strategy, **settings)
    fabric.launch()
    # While the interpreter still runs: a thread of gloo that frees a tensor known to Python after
    # that ends the process with SIGABRT. Fabric does this for NCCL alone.
    atexit.register(leave_process_group)
    return fabric


def _ddp() -> DDPStrategy:
    # Buffers are constants here. The name of the option changed with PyTorch 2.13.
    known = inspect.signature(DistributedDataParallel).parameters
    name = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    options: dict[str, Any] = {name: False}
    return DDPStrategy(**options)


def _fsdp(processes: int) -> ModelParallelStrategy:
    return ModelParallelStrategy(_shard, data_parallel_size=processes, tensor_parallel_size=1)


def _shard(module: Any, mesh: DeviceMesh) -> nn.Module:
    """Leaves each process its share of every parameter.

    All parameters are one group: our models run layers by their weights, past the modules whose
    calls would gather a layer's alone.
    """
    module.to(mesh.device_type)
    with torch.no_grad():
        for parameter in module.parameters():
            torch.distributed.broadcast(parameter, 0)
    sharded: Any = fully_shard(module, mesh=mesh["data_parallel"])
    # Else processes would mix up what only some of them have a gradient for.
    if hasattr(sharded, "set_reduce_scatter_unused_params"):  # PyTorch 2.13
        sharded.set_reduce_scatter_unused_params(True)
    return sharded  # type: ignore[no-any-return]


def leave_process_group() -> None:
    """Ends the threads of torch.distributed, unless somebody has done so."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def precision_on(accelerator: str) -> Literal["fp32", "bf16"]:
    """bf16 where the device has products of it, else fp32.

    An x86 processor without AVX-512 emulates them: a product of matrices took a hundred times as
    long as in fp32.
    """
    if accelerator == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        # What PyTorch itself asks before it hands bf16 to oneDNN.
        mkldnn = torch.backends.mkldnn.is_available()
        native = mkldnn and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return "bf16" if native else "fp32"


def keep_freed_memory() -> None:
    """Has the C library keep freed memory for the next tensor, from now on in this process.

    glibc gives large blocks back to the kernel, which clears every page again when it is next asked
    for: a sixth of an update's time on a CPU. Elsewhere nothing happens.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    trim_threshold, mmap_max = -1, -4  # of malloc.h
    mallopt = ctypes.CDLL(None).mallopt
    mallopt(mmap_max, 0)
    mallopt(trim_threshold, 2**31 - 1)


@contextmanager
def determinism(wanted: bool) -> Iterator[None]:
    """Deterministic algorithms, where PyTorch has them, and as it was before at the end."""
    mode = torch.get_deterministic_debug_mode()
    settings: Any = torch.utils.deterministic
    fill = settings.fill_uninitialized_memory
    try:
        if wanted and not mode:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True, warn_only=True)
            # A help to find bugs that costs a pass over every new tensor.
            settings.fill_uninitialized_memory = False
        yield
    finally:
        torch.set_deterministic_debug_mode(mode)
        settings.fill_uninitialized_memory = fill
