# SPDX-License-Identifier: Apache-2.0
"""The part that all layers over quantized weights share: loading, saving, moving, and the float weight to compute with.

A layer keeps the bytes as they are in the file, whatever the host would do with a float weight. What is done with them
in the forward is in ops.py.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import Any, Literal

import comfy.float
import torch

from .compat import as_param, dequantize_weight, is_quantized, with_dtype
from .file_bytes import move
from .lazy_weight import LazyWeight
from .lora import PatchableWeight, patch_weight
from .native import become_native, native_class


@dataclasses.dataclass(frozen=True)
class OpsOptions:
    """How the layers of one loaded model compute.

    Attributes:
        dequant_dtype: dtype the weights are rounded to before they are cast to the compute dtype; None: only that.
        patch_dtype: dtype in which LoRA and other patches are computed; "target": the compute dtype; None: the compute
            dtype for plain LoRA, float32 for all that changes the weight itself.
        patch_on_device: keep the LoRA factors on the compute device between steps.
    """

    dequant_dtype: torch.dtype | None = None
    patch_dtype: torch.dtype | Literal["target"] | None = None
    patch_on_device: bool = False


def tensor_device(device: torch.device) -> torch.device:
    """A device as tensors name it, with the index that "cuda" stands for."""
    return torch.empty(0, device=device).device


class QuantizedLayer(PatchableWeight):
    """Mixin over a host layer whose weight may be quantized; with a float weight it is the host's own layer.

    Attributes:
        options: the options of this load.
        weight: quantized or float parameter (out, in, ...), None until it is loaded.
        bias: float parameter (out,) or None.
        missing: names of parameters that the file did not have; they are zero.
        kind: the layer's name in an ops namespace.
        can_keep: whether it computes from the whole weight, so that keeping it dequantized saves time.
    """

    options = OpsOptions()
    missing: frozenset[str] = frozenset()
    kind = ""
    can_keep = False
    comfy_cast_weights = True
    _kept: torch.Tensor | None = None

    def __init__(self, *args: Any, device: Any = None, dtype: torch.dtype | None = None, **kwargs: Any) -> None:
        # Built on the meta device: shapes and attributes of the host's layer without memory for its weights.
        super().__init__(*args, device="meta", dtype=dtype, **kwargs)
        self._arguments = args, kwargs | {"device": device, "dtype": dtype}
        self._expected_shapes = {
            name: tuple(p.shape) for name, p in (("weight", self.weight), ("bias", self.bias)) if p is not None
        }
        self.weight = None
        self.bias = None
        self.weight_comfy_model_dtype = dtype
        self.bias_comfy_model_dtype = dtype

    def __deepcopy__(self, memo: dict[int, Any]) -> QuantizedLayer:
        """A layer of its own over the same bytes, which nothing changes in place."""
        memo |= {id(value): value for value in self._parameters.values() if is_quantized(value)}
        copied = memo[id(self)] = self.__class__.__new__(self.__class__)
        state = {name: value for name, value in self.__dict__.items() if name != "_kept"}
        copied.__dict__.update(copy.deepcopy(state, memo))
        return copied

    # -- state --

    def _load_from_state_dict(
        self,
        state_dict: dict[str, torch.Tensor],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Take weight and bias as they are, without a copy, whatever the host says about assigning.

        A layer that the host itself quantized becomes the host's own layer, and loads as such.
        """
        try:
            native = native_class(self.kind, state_dict, prefix, self.weight_comfy_model_dtype)
        except ValueError as error:
            error_msgs.append(str(error))
            return
        if native is not None:
            become_native(self, native, self._arguments)
            rest = local_metadata, strict, missing_keys, unexpected_keys, error_msgs
            self._load_from_state_dict(state_dict, prefix, *rest)
            return
        self.drop_kept()
        for name, shape in self._expected_shapes.items():
            value = state_dict.get(prefix + name)
            if value is None:
                missing_keys.append(prefix + name)
                if self._parameters[name] is None:
                    self._fill_missing(name, shape)
            elif not self._fits(tuple(value.shape), shape):
                error_msgs.append(
                    f"size mismatch for {prefix}{name}: {tuple(value.shape)} in the file, {shape} in the model"
                )
            else:
                self._parameters[name] = self._adopt(name, value)
                self.missing -= {name}
        if strict:
            names = [key.removeprefix(prefix) for key in state_dict if key.startswith(prefix)]
            unexpected_keys += [prefix + n for n in names if "." not in n and n not in self._expected_shapes]

    def _fits(self, found: tuple[int, ...], expected: tuple[int, ...]) -> bool:
        return found == expected

    def _fill_missing(self, name: str, shape: tuple[int, ...]) -> None:
        # One zero seen everywhere: whole models can be missing, of a picture part or of a file that is then refused.
        zero = torch.zeros((), dtype=self.weight_comfy_model_dtype)
        self._parameters[name] = torch.nn.Parameter(zero.expand(shape), requires_grad=False)
        self.missing |= {name}

    def _adopt(self, name: str, value: torch.Tensor) -> torch.Tensor:
        if isinstance(value, LazyWeight):
            value = value.module.weight
        if not is_quantized(value):
            return torch.nn.Parameter(value, requires_grad=False)
        if name == "bias":
            return torch.nn.Parameter(dequantize_weight(value, torch.float32), requires_grad=False)
        return as_param(with_dtype(value, self.weight_comfy_model_dtype))

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """What the file had; zeros that stand for what it lacked weigh nothing and are not written."""
        for name, value in (("weight", self.weight), ("bias", self.bias)):
            if name in self.missing:
                continue
            if is_quantized(value):
                destination[prefix + name] = self.lazy_weight()
            elif value is not None:
                destination[prefix + name] = value if keep_vars else value.detach()

    def lazy_weight(self) -> LazyWeight:
        """The weight as others may save or convert it."""
        return LazyWeight(self)

    def _apply(self, fn: Any, recurse: bool = True) -> QuantizedLayer:
        """Move or convert by putting new parameters in place; torch's own way writes into the old ones."""
        for name, value in self._parameters.items():
            if value is None:
                continue
            if name in self.missing:  # stays a single zero
                new: torch.Tensor = torch.nn.Parameter(fn(value.flatten()[:1]).expand(value.shape), False)
            else:
                new = move(value, fn)
            self._parameters[name] = new
            if self._kept is not None and self._kept.device != new.device:
                self.drop_kept()
        return self

    # -- what a host's patcher calls when it patches a weight itself --

    def convert_weight(self, weight: torch.Tensor, inplace: bool = False, **kwargs: Any) -> torch.Tensor:
        """Quantized to float, for arithmetic; float weights pass."""
        return dequantize_weight(weight, weight.dtype) if is_quantized(weight) else weight

    def set_weight(
        self,
        weight: torch.Tensor,
        inplace_update: bool | None = None,
        seed: int | None = None,
        return_weight: bool = False,
        **kwargs: Any,
    ) -> torch.Tensor | None:
        """Put a patched float weight in place of the loaded one, or only return it, in the loaded dtype, to be saved.

        In place it is rounded to the wider of the loaded and the model's dtype: a BF16 tensor in a float32 model loses
        nothing. Older hosts call this in every forward of an offloaded layer, without inplace_update: the same then.
        """
        loaded, model = self.weight.dtype, self.weight_comfy_model_dtype or self.weight.dtype
        to_save = return_weight and inplace_update is not None
        dtype = loaded if to_save else max(loaded, model, key=lambda d: d.itemsize)
        weight = comfy.float.stochastic_rounding(weight, dtype, seed=seed or 0)
        if return_weight:
            return weight
        self.drop_kept()
        # After an update "in place" the host keeps its tensor, and later writes other values into the parameter.
        own = weight.clone() if inplace_update else weight
        self._parameters["weight"] = torch.nn.Parameter(own, requires_grad=False)
        return None

    def merged_weight(self, patches: list[Any], key: str, device: Any = None) -> torch.Tensor:
        """The weight with `patches`, computed in float32 on `device`, in the dtype that the weight claims."""
        weight = self.weight if device is None else self.weight.to(device=device)
        merged = dequantize_weight(weight, torch.float32)
        return (patch_weight(merged, patches, key, weight) if patches else merged).to(weight.dtype)

    # -- forward --

    def keep(self, device: torch.device, dtype: torch.dtype) -> None:
        """Keep the weight dequantized on a device from now on, unless it is or has become a float weight."""
        device = tensor_device(device)
        if not is_quantized(self.weight) or self.has_kept(device, dtype):
            return
        # Made as a normal tensor, so that it also serves where gradients of the input are wanted.
        with torch.inference_mode(False), torch.no_grad():
            self._kept = self._dequantize(self.weight.to(device=device), dtype)

    def drop_kept(self) -> None:
        """Dequantize in each forward again."""
        self._kept = None

    def kept_bytes(self) -> int:
        """Bytes of the weight that is kept, 0 if none is."""
        return 0 if self._kept is None else self._kept.nbytes

    def has_kept(self, device: torch.device, dtype: torch.dtype) -> bool:
        """Whether the weight is kept for such inputs."""
        return self._kept is not None and self._kept.dtype == dtype and self._kept.device == device

    def _dequantize(self, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return dequantize_weight(weight, self.options.dequant_dtype or dtype).to(dtype)

    def shared_weight(self, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """A weight that cast_weight() gave, as a float tensor without patches; other calls may get the same one."""
        if not is_quantized(weight):
            return weight.to(dtype)
        return self._kept if self.has_kept(weight.device, dtype) else self._dequantize(weight, dtype)

    def float_weight(self, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The same as a private tensor, which may be written to."""
        if not is_quantized(weight):
            return weight.to(dtype, copy=True)
        return self._kept.clone() if self.has_kept(weight.device, dtype) else self._dequantize(weight, dtype)

    def patched_weight(self, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The same with all patches in force and the host's weight wrappers applied, rounded once to `dtype`."""
        patches, wrappers = self.active_patches(), self.wrapper_functions()
        if not patches:
            result = self.float_weight(weight, dtype) if wrappers else self.shared_weight(weight, dtype)
        else:
            patch_dtype = self._patch_dtype(dtype, default=torch.float32)
            key = (self.base_patch() or self._hook_patch).key
            result = patch_weight(self.float_weight(weight, patch_dtype), patches, key, weight).to(dtype)
        for function in wrappers:
            result = function(result)
        return result

    def prepare_patches(self, device: torch.device, dtype: torch.dtype) -> None:
        """Make ahead what the patches in force need in forwards on a device in a compute dtype: here, nothing."""

    def _patch_dtype(self, compute_dtype: torch.dtype, default: torch.dtype) -> torch.dtype:
        chosen = self.options.patch_dtype
        return compute_dtype if chosen == "target" else chosen or default
