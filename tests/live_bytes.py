"The bytes of all tensors that operators gave and that are still alive."

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    "Inside, `most` is the largest sum of the bytes alive behind any operator."

    def __enter__(self):
        self.held, self.most = {}, 0  # bytes of each storage, by what does not keep it alive
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor):
                storage = x.untyped_storage()
                self.held[StorageWeakRef(storage)] = storage.nbytes()
        self.held = {ref: n for ref, n in self.held.items() if not ref.expired()}
        self.most = max(self.most, sum(self.held.values()))
        return out
