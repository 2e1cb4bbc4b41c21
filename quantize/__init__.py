# SPDX-License-Identifier: Apache-2.0
"""Makes GGUF files: reads sources, chooses types, encodes with ggml or torch, writes. Knows no ComfyUI."""
