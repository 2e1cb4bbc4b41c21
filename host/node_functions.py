# SPDX-License-Identifier: Apache-2.0
"""The host's loader nodes for kinds of models that it reads from a file only, given tensors in place of the file.

What such a node builds from which keys is written in its function alone. So that function is run as it is, over a copy
of its globals in which reading a file gives our tensors, and the operations may be ours. The host itself stays as it
is: a function made here shares its code with the host's, nothing is put into a module of the host.
"""

from __future__ import annotations

import inspect
import types
from typing import Any

import comfy
import comfy.ops
import comfy.utils
import folder_paths
import torch

from nodes import NODE_CLASS_MAPPINGS

# What a function must call for tensors to be handed to it.
READS = "load_torch_file"


class _Instead:
    """An object of the host with some of its attributes replaced; all others are its own."""

    def __init__(self, original: Any, **replaced: Any) -> None:
        self._original = original
        vars(self).update(replaced)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._original, name)


def find_loader(node_id: str) -> types.MethodType | None:
    """The function of a host's loader node that takes a file's name, bound; None where this host has none that fits."""
    node = NODE_CLASS_MAPPINGS.get(node_id)
    if node is None:
        return None
    method = node.execute if hasattr(node, "define_schema") else getattr(node(), node.FUNCTION)
    function, owner = inspect.unwrap(getattr(method, "__func__", method)), getattr(method, "__self__", None)
    if owner is None or not isinstance(function, types.FunctionType) or function.__closure__:
        return None
    return types.MethodType(function, owner) if READS in function.__code__.co_names else None


def run_loader(
    loader: types.MethodType,
    path: str,
    state: dict[str, torch.Tensor],
    metadata: dict[str, str] | None,
    operations: Any = None,
) -> Any:
    """What a function of find_loader() makes of tensors that stand for the file at `path`; its first output.

    Args:
        metadata: of the safetensors file that the model came from, or None.
        operations: layers in place of the host's manual_cast; None: the host's own.
    """

    def read(*_: Any, return_metadata: bool = False, **__: Any) -> Any:
        return (state, metadata) if return_metadata else state

    def locate(*_: Any) -> str:
        return path

    own = {} if operations is None else {"ops": _Instead(comfy.ops, manual_cast=operations)}
    names = {
        "comfy": _Instead(comfy, utils=_Instead(comfy.utils, load_torch_file=read), **own),
        "folder_paths": _Instead(folder_paths, get_full_path=locate, get_full_path_or_raise=locate),
        READS: read,
    }
    function: Any = loader.__func__
    twin = types.FunctionType(
        function.__code__, {**function.__globals__, **names}, function.__name__, function.__defaults__
    )
    twin.__kwdefaults__ = function.__kwdefaults__
    return twin(loader.__self__, path)[0]
