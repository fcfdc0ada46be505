"""What would wait for a GPU, found without one."""

from __future__ import annotations

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Watch(TorchDispatchMode):
    """On meta tensors: what would wait for a GPU, or copy to it from the host."""

    # Scalars of these become tensors on the CPU, and then on the device.
    COPYING = ("aten::where.Scalar", "aten::lift_fresh", "aten::_to_copy", "aten::to.device")

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if func.name().startswith(self.COPYING) or any(not x.is_meta for x in tensors):
            self.found.append(func.name())
        return func(*args, **kwargs)
