"""transformers' models from exactly the tensors that were checked.

Given a directory, transformers would choose files by rules of its own: a single file before an index, an adapter that
lies beside, a file that config.json names. Given tensors it chooses nothing.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from nexus_gen.tensors.compat import quiet_loading
from nexus_gen.tensors.files import TensorFiles
from nexus_gen.tensors.layouts import Source


class Unread:
    """A tensor of a file that is read when transformers indexes it, which it does once, and then given back.

    So no more than a few tensors are in memory beside the model.
    """

    def __init__(self, files: TensorFiles, key: str, dtype: torch.dtype) -> None:
        self.files, self.key, self.dtype = files, key, dtype

    def __getitem__(self, index: Any) -> Tensor:
        made = self.files[self.key].to(self.dtype)
        self.files.release(self.key, made)
        return made[index]


def load_pretrained(
    kind: Any,
    config: Any,
    files: TensorFiles,
    sources: Mapping[str, Source],
    dtype: torch.dtype,
    lacking: Iterable[str] = (),
) -> Any:
    """A model of transformers' class `kind` on the files' device, in eval mode.

    sources: for each name that `kind` takes, on disk or in memory, where the files hold it; checked by the caller.
    lacking: keys in memory that the files have nothing for.
    """
    state = {name: Unread(files, source.keys[0], dtype) for name, source in sources.items()}
    with quiet_loading():
        model, info = kind.from_pretrained(
            None,
            config=config,
            state_dict=state,
            dtype=dtype,
            device_map={"": files.device},
            ignore_mismatched_sizes=True,  # the assertion below names them
            output_loading_info=True,
        )
    unread = set(info["missing_keys"]) ^ set(lacking), info["unexpected_keys"], info["mismatched_keys"]
    assert not any(unread), f"transformers reads the keys of {files.path} otherwise than we do: {unread}"
    return model.eval()
