# SPDX-License-Identifier: Apache-2.0
"""Writes example_workflows/*.json, the templates of ComfyUI's template browser, from the short descriptions below.

    python tests/make_workflows.py

The browser lists a template under its file name and shows the picture of the same name. Widget values are in the order
of the node's inputs; after a seed comes what happens to it after each run.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

FOLDER = Path(__file__).resolve().parent.parent / "example_workflows"
GROUP_TITLE_HEIGHT = 70
GROUP_MARGIN = 20
COLOURS = MappingProxyType({"Files": "#3f789e", "Prompt": "#3f8a4f", "Sampling": "#8a6d3f", "Result": "#6d3f8a"})

Groups = dict[str, tuple[str, ...]]

# Types of a node's outputs.
OUTPUTS = MappingProxyType(
    {
        "UnetLoaderGGUF": ("MODEL",),
        "CLIPLoaderGGUF": ("CLIP",),
        "DualCLIPLoaderGGUF": ("CLIP",),
        "VAELoader": ("VAE",),
        "CLIPTextEncode": ("CONDITIONING",),
        "FluxGuidance": ("CONDITIONING",),
        "ConditioningZeroOut": ("CONDITIONING",),
        "TinyFluxConditioning": ("CONDITIONING",),
        "EmptySD3LatentImage": ("LATENT",),
        "EmptyHunyuanLatentVideo": ("LATENT",),
        "ModelSamplingSD3": ("MODEL",),
        "ModelSamplingAuraFlow": ("MODEL",),
        "KSampler": ("LATENT",),
        "VAEDecode": ("IMAGE",),
        "SaveImage": (),
        "SaveAnimatedWEBP": (),
        "MarkdownNote": (),
    }
)


@dataclass(frozen=True)
class Node:
    """One node of a template.

    Attributes:
        type: class id, a key of OUTPUTS.
        at, size: left upper corner below the title, and width and height, in pixels.
        widgets: values in the order of the inputs.
        links: input -> the node whose first output goes there, by its name in the description.
        title: shown instead of the node's own name, or "".
    """

    type: str
    at: tuple[int, int]
    size: tuple[int, int]
    widgets: tuple[Any, ...] = ()
    links: dict[str, str] = field(default_factory=dict)
    title: str = ""


@dataclass(frozen=True)
class Template:
    """A workflow: nodes by name, and groups, a title -> names of the nodes in it."""

    nodes: dict[str, Node]
    groups: Groups


def note(text: str, height: int, width: int = 420) -> Node:
    """The note at the left of every template."""
    return Node("MarkdownNote", (-480, 0), (width, height), (text,), title="Read me first")


def sampling(
    x: int, latent: Node, steps: int, cfg: float, seed: int, model: str = "model", **conditioning: str
) -> dict[str, Node]:
    """An empty latent and a sampler over nodes named positive and negative, unless conditioning names others."""
    links = {"model": model, "positive": "positive", "negative": "negative", "latent_image": "latent"} | conditioning
    widgets = (seed, "fixed", steps, cfg, "euler", "simple", 1.0)
    return {"latent": latent, "sampler": Node("KSampler", (x, 180), (300, 262), widgets, links)}


def result(x: int, saver: str, widgets: tuple[Any, ...], size: tuple[int, int]) -> dict[str, Node]:
    """Decode what the sampler made, and save and show it."""
    decode = Node("VAEDecode", (x, 0), (size[0], 46), (), {"samples": "sampler", "vae": "vae"})
    return {"decode": decode, "save": Node(saver, (x, 110), size, widgets, {"images": "decode"})}


def groups(prompt: tuple[str, ...], encoder: tuple[str, ...] = (), shift: tuple[str, ...] = ()) -> Groups:
    """The four groups that all templates have; some have a text encoder and a shift of the time steps."""
    sampled = ("latent", "sampler", *shift)
    return {
        "Files": ("model", "vae", *encoder),
        "Prompt": prompt,
        "Sampling": sampled,
        "Result": ("decode", "save"),
    }


TINY_NOTE = """# A picture in seconds, on any machine

A Flux of 9 million weights in 6 MB that draws coloured handwritten digits. It shows that the loader works; a GPU is not
needed. Put its files into this ComfyUI with one command in the pack's folder, by the Python that ComfyUI runs with:

```
python demo/install.py
```

In the portable version that is

```
..\\..\\..\\python_embeded\\python.exe demo\\install.py
```

No folder *demo* there? What comes from the registry lacks it: clone the repository, or take another template.

Restart ComfyUI, open this template again and press **Run**. Other prompts are in the list of *Tiny Flux Conditioning*.

The same command with `--remove` takes all of it away.
"""

FLUX_NOTE = """# {title}

| file | folder in models | from huggingface.co |
|---|---|---|
| {file} | diffusion_models | {repository} |
| t5-v1_1-xxl-encoder-Q5_K_M.gguf | text_encoders | city96/t5-v1_1-xxl-encoder-gguf |
| clip_l.safetensors | text_encoders | comfyanonymous/flux_text_encoders |
| ae.safetensors | vae | Comfy-Org/Lumina_Image_2.0_Repackaged |

Any type will do: take the largest that fits your memory. Q4_K_S is 6.8 GB, Q8_0 12.7 GB. Both text encoders may be GGUF
or safetensors. Press **R** after you copied files, then choose them in the nodes.

{advice}
"""

WAN_NOTE = """# Wan 2.1, text to video

| file | folder in models | from huggingface.co |
|---|---|---|
| wan2.1-t2v-14b-Q4_K_M.gguf | diffusion_models | city96/Wan2.1-T2V-14B-gguf |
| umt5-xxl-encoder-Q5_K_M.gguf | text_encoders | city96/umt5-xxl-encoder-gguf |
| wan_2.1_vae.safetensors | vae | Comfy-Org/Wan_2.1_ComfyUI_repackaged |

Press **R** after you copied files, then choose them in the nodes. The 1.3B model works here too, in a tenth of the
memory. The length is in frames, 16 a second: 4 n + 1, as 33 or 81.
"""

QWEN_NOTE = """# Qwen-Image

| file | folder in models | from huggingface.co |
|---|---|---|
| qwen-image-Q4_K_M.gguf | diffusion_models | city96/Qwen-Image-gguf |
| Qwen2.5-VL-7B-Instruct-Q4_K_M.gguf | text_encoders | unsloth/Qwen2.5-VL-7B-Instruct-GGUF |
| qwen_image_vae.safetensors | vae | Comfy-Org/Qwen-Image_ComfyUI |

Press **R** after you copied files, then choose them in the nodes. *vision_name* is for editing pictures; none is right
here. Chinese and English text in the picture: put it in quotation marks.
"""


def tiny_flux() -> Template:
    """The model that demo/install.py installs."""
    latent = Node("EmptySD3LatentImage", (400, 0), (300, 106), (128, 128, 1))
    nodes = {
        "note": note(TINY_NOTE, 560),
        "model": Node("UnetLoaderGGUF", (0, 0), (340, 110), ("tiny-flux-Q4_K_S.gguf", "none")),
        "vae": Node("VAELoader", (0, 170), (340, 60), ("tiny-flux-vae.safetensors",)),
        "positive": Node("TinyFluxConditioning", (0, 340), (340, 60), ("red 0",)),
        **sampling(400, latent, 8, 1.0, 17, negative="positive"),
        **result(760, "SaveImage", ("gguf-kit/tiny-flux",), (320, 360)),
    }
    return Template(nodes, groups(("positive",)))


def flux(title: str, file: str, repository: str, steps: int, guidance: float | None) -> Template:
    """Flux dev with its guidance, or schnell without."""
    advice = "Flux schnell needs four steps, cfg 1 and no guidance."
    guided: dict[str, Node] = {}
    if guidance is not None:
        advice = "Flux dev is distilled: cfg stays 1, *guidance* does its work."
        guided["positive"] = Node("FluxGuidance", (400, 230), (360, 60), (guidance,), {"conditioning": "text"})
    encoders = ("clip_l.safetensors", "t5-v1_1-xxl-encoder-Q5_K_M.gguf", "flux", "default")
    prompt = "a glass teapot on a wooden table by a window, morning light, steam rising"
    latent = Node("EmptySD3LatentImage", (820, 0), (300, 106), (1024, 1024, 1))
    nodes = {
        "note": note(FLUX_NOTE.format(title=title, file=file, repository=repository, advice=advice), 480),
        "model": Node("UnetLoaderGGUF", (0, 0), (340, 110), (file, "none")),
        "clip": Node("DualCLIPLoaderGGUF", (0, 160), (340, 160), encoders),
        "vae": Node("VAELoader", (0, 370), (340, 60), ("ae.safetensors",)),
        "text": Node("CLIPTextEncode", (400, 0), (360, 180), (prompt,), {"clip": "clip"}, "Prompt"),
        **guided,
        "negative": Node("ConditioningZeroOut", (400, 340), (360, 46), (), {"conditioning": "text"}),
        **sampling(820, latent, steps, 1.0, 1, positive="positive" if guided else "text"),
        **result(1180, "SaveImage", ("gguf-kit/flux",), (420, 440)),
    }
    return Template(nodes, groups(("text", *guided, "negative"), ("clip",)))


def prompts(positive: str, negative: str) -> dict[str, Node]:
    """Two texts through one encoder."""
    return {
        "positive": Node("CLIPTextEncode", (400, 0), (360, 180), (positive,), {"clip": "clip"}, "Prompt"),
        "negative": Node("CLIPTextEncode", (400, 240), (360, 140), (negative,), {"clip": "clip"}, "Negative prompt"),
    }


def wan() -> Template:
    """Wan 2.1 14B, text to video."""
    prompt = "a red fox runs through fresh snow at the edge of a forest, low sun, the camera follows"
    latent = Node("EmptyHunyuanLatentVideo", (820, 0), (300, 130), (832, 480, 33, 1))
    nodes = {
        "note": note(WAN_NOTE, 400),
        "model": Node("UnetLoaderGGUF", (0, 0), (340, 110), ("wan2.1-t2v-14b-Q4_K_M.gguf", "none")),
        "clip": Node("CLIPLoaderGGUF", (0, 160), (340, 160), ("umt5-xxl-encoder-Q5_K_M.gguf", "wan", "default")),
        "vae": Node("VAELoader", (0, 370), (340, 60), ("wan_2.1_vae.safetensors",)),
        **prompts(prompt, "blurry, still, distorted"),
        "shift": Node("ModelSamplingSD3", (820, 500), (300, 60), (8.0,), {"model": "model"}),
        **sampling(820, latent, 30, 6.0, 1, model="shift"),
        **result(1180, "SaveAnimatedWEBP", ("gguf-kit/wan", 16.0, False, 90, "default"), (480, 460)),
    }
    return Template(nodes, groups(("positive", "negative"), ("clip",), ("shift",)))


def qwen_image() -> Template:
    """Qwen-Image, text to picture."""
    encoder = ("Qwen2.5-VL-7B-Instruct-Q4_K_M.gguf", "qwen_image", "default", "none")
    latent = Node("EmptySD3LatentImage", (820, 0), (300, 106), (1328, 1328, 1))
    nodes = {
        "note": note(QWEN_NOTE, 400),
        "model": Node("UnetLoaderGGUF", (0, 0), (340, 110), ("qwen-image-Q4_K_M.gguf", "none")),
        "clip": Node("CLIPLoaderGGUF", (0, 160), (340, 160), encoder),
        "vae": Node("VAELoader", (0, 370), (340, 60), ("qwen_image_vae.safetensors",)),
        **prompts('a small bookshop in the rain, a neon sign above its door reads "GGUF"', " "),
        "shift": Node("ModelSamplingAuraFlow", (820, 500), (300, 60), (3.1,), {"model": "model"}),
        **sampling(820, latent, 20, 2.5, 1, model="shift"),
        **result(1180, "SaveImage", ("gguf-kit/qwen-image",), (480, 460)),
    }
    return Template(nodes, groups(("positive", "negative"), ("clip",), ("shift",)))


# File name without its end -> template. Letters, digits, - and _ alone: links to templates take no others.
TEMPLATES = MappingProxyType(
    {
        "GGUF-tiny-Flux-runs-as-it-is": tiny_flux(),
        "GGUF-Flux-dev": flux("Flux.1 dev", "flux1-dev-Q4_K_S.gguf", "city96/FLUX.1-dev-gguf", 20, 3.5),
        "GGUF-Flux-schnell": flux("Flux.1 schnell", "flux1-schnell-Q4_K_S.gguf", "city96/FLUX.1-schnell-gguf", 4, None),
        "GGUF-Wan-text-to-video": wan(),
        "GGUF-Qwen-Image": qwen_image(),
    }
)


def to_json(template: Template) -> dict[str, Any]:
    """The workflow as the frontend saves one, version 0.4."""
    ids = {name: number for number, name in enumerate(template.nodes, 1)}
    links: list[list[Any]] = []
    nodes = [_node(name, template.nodes[name], ids, template.nodes, links) for name in template.nodes]
    for node in nodes:
        for output in node["outputs"]:
            output["links"] = [link[0] for link in links if link[1] == node["id"]] or None
    return {
        "revision": 0,
        "last_node_id": len(nodes),
        "last_link_id": len(links),
        "nodes": nodes,
        "links": links,
        "groups": [_group(i, title, template) for i, title in enumerate(template.groups, 1)],
        "config": {},
        "extra": {},
        "version": 0.4,
    }


def _node(name: str, node: Node, ids: dict[str, int], nodes: dict[str, Node], links: list[list[Any]]) -> dict[str, Any]:
    inputs = []
    for slot, (key, source) in enumerate(node.links.items()):
        kind = OUTPUTS[nodes[source].type][0]
        links.append([len(links) + 1, ids[source], 0, ids[name], slot, kind])
        inputs.append({"name": key, "type": kind, "link": len(links)})
    ours = {"cnr_id": "gguf-kit"} if node.type.endswith("GGUF") else {"cnr_id": "comfy-core"}
    properties = {} if node.type in ("MarkdownNote", "TinyFluxConditioning") else ours
    return {
        "id": ids[name],
        "type": node.type,
        "pos": list(node.at),
        "size": list(node.size),
        "flags": {},
        "order": ids[name] - 1,
        "mode": 0,
        "inputs": inputs,
        "outputs": [{"name": kind, "type": kind, "links": None} for kind in OUTPUTS[node.type]],
        **({"title": node.title} if node.title else {}),
        "properties": {"Node name for S&R": node.type, **properties},
        "widgets_values": list(node.widgets),
    }


def _group(number: int, title: str, template: Template) -> dict[str, Any]:
    members = [template.nodes[name] for name in template.groups[title]]
    left, top = min(node.at[0] for node in members), min(node.at[1] for node in members)
    right = max(node.at[0] + node.size[0] for node in members)
    bottom = max(node.at[1] + node.size[1] for node in members)
    above = GROUP_TITLE_HEIGHT
    box = [left - GROUP_MARGIN, top - above, right - left + 2 * GROUP_MARGIN, bottom - top + above + GROUP_MARGIN]
    return {"id": number, "title": title, "bounding": box, "color": COLOURS[title], "font_size": 24, "flags": {}}


def to_text(template: Template) -> str:
    """The file's content."""
    return json.dumps(to_json(template), indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for template_name, template in TEMPLATES.items():
        (FOLDER / f"{template_name}.json").write_text(to_text(template), encoding="utf-8")
