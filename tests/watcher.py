"""A mode that notes which ops pass torch's dispatcher."""

from __future__ import annotations

from torch.utils._python_dispatch import TorchDispatchMode


class Watcher(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(func.name())
        return func(*args, **(kwargs or {}))
