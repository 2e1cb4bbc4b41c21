# SPDX-License-Identifier: Apache-2.0
"""Text encoders: how the tensors of llama.cpp's files are called in ComfyUI's models.

Each entry maps whole names, with a {bid} slot for the block number; nothing is replaced inside a name. To add an
encoder, add an entry.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping


@dataclasses.dataclass(frozen=True)
class TextEncoder:
    """One family of text encoders.

    Attributes:
        title: what users call it.
        archs: values of `general.architecture`; for messages only.
        marker: a tensor name that this family has, absent: one that it does not have ("": no such name).
        keys: llama.cpp name to state-dict key.
        refuse: name prefix to the reason why a file that has such tensors is of no use.
    """

    title: str
    archs: tuple[str, ...]
    marker: str
    keys: Mapping[str, str]
    absent: str = ""
    refuse: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def key_map(self, names: Iterable[str]) -> tuple[dict[str, str], list[str]]:
        """State-dict key of each name, and the names that match no rule."""
        mapped, unknown = {}, []
        for name in names:
            bid = _BLOCK_NUMBER.search(name)
            key = self.keys.get(_BLOCK_NUMBER.sub("{bid}", name, count=1))
            if key is None:
                unknown.append(name)
            else:
                mapped[name] = key.replace("{bid}", bid.group()) if bid else key
        return mapped, unknown


_BLOCK_NUMBER = re.compile(r"(?<=blk\.)\d+")
_T5_BLOCK = "encoder.block.{bid}.layer"
_T5_KEYS = {
    "token_embd.weight": "shared.weight",
    "enc.output_norm.weight": "encoder.final_layer_norm.weight",
    "enc.blk.{bid}.attn_q.weight": f"{_T5_BLOCK}.0.SelfAttention.q.weight",
    "enc.blk.{bid}.attn_k.weight": f"{_T5_BLOCK}.0.SelfAttention.k.weight",
    "enc.blk.{bid}.attn_v.weight": f"{_T5_BLOCK}.0.SelfAttention.v.weight",
    "enc.blk.{bid}.attn_o.weight": f"{_T5_BLOCK}.0.SelfAttention.o.weight",
    "enc.blk.{bid}.attn_rel_b.weight": f"{_T5_BLOCK}.0.SelfAttention.relative_attention_bias.weight",
    "enc.blk.{bid}.attn_norm.weight": f"{_T5_BLOCK}.0.layer_norm.weight",
    "enc.blk.{bid}.ffn_down.weight": f"{_T5_BLOCK}.1.DenseReluDense.wo.weight",
    "enc.blk.{bid}.ffn_norm.weight": f"{_T5_BLOCK}.1.layer_norm.weight",
}
_T5_REFUSE = {
    "dec.": "it is a full encoder-decoder; take a file with the encoder only (general.architecture t5encoder)",
    "enc.blk.1.attn_rel_b.": "it is a UMT5, whose tokenizer this version cannot rebuild; take the safetensors file",
}

TEXT_ENCODERS: tuple[TextEncoder, ...] = (
    TextEncoder(
        title="T5 v1.1",
        archs=("t5", "t5encoder"),
        marker="enc.blk.0.ffn_gate.weight",
        keys={
            **_T5_KEYS,
            "enc.blk.{bid}.ffn_gate.weight": f"{_T5_BLOCK}.1.DenseReluDense.wi_0.weight",
            "enc.blk.{bid}.ffn_up.weight": f"{_T5_BLOCK}.1.DenseReluDense.wi_1.weight",
        },
        refuse=_T5_REFUSE,
    ),
    TextEncoder(
        title="T5 v1.0",
        archs=("t5", "t5encoder"),
        marker="enc.blk.0.ffn_up.weight",
        absent="enc.blk.0.ffn_gate.weight",
        keys={**_T5_KEYS, "enc.blk.{bid}.ffn_up.weight": f"{_T5_BLOCK}.1.DenseReluDense.wi.weight"},
        refuse=_T5_REFUSE,
    ),
)

# Keys by which a file that already has ComfyUI's (Hugging Face) names is known.
NATIVE_MARKERS = ("encoder.block.0.layer.0.SelfAttention.q.weight",)


def detect(names: Iterable[str]) -> TextEncoder | None:
    """The entry whose marker is among the tensor names, or None."""
    present = set(names)
    return next((e for e in TEXT_ENCODERS if e.marker in present and e.absent not in present), None)
