# SPDX-License-Identifier: Apache-2.0
"""The pinned llama.cpp: downloaded from the user's package index, checked by its hash, unpacked, patched.

The archive is read as a file; nothing in it is run. pip's settings (index-url, extra-index-url, cert, proxy) and uv's
are honoured, so it works where `pip install` does. A newer llama.cpp is a change of pinned.json (README.md).
"""

from __future__ import annotations

import base64
import hashlib
import html.parser
import json
import os
import re
import shutil
import ssl
import subprocess
import sys
import tarfile
import tempfile
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path, PurePosixPath

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import _pack  # noqa: F401
from gguf_kit.quantize.ggml import BUILD_FOLDER, BuildError, cache_folder

PATCH = BUILD_FOLDER / "llama_cpp.patch"
DEFAULT_INDEX = "https://pypi.org/simple"
# What a build reads of llama.cpp; models, tests and backends stay in the archive.
NEEDED = re.compile(
    r"(ggml/include|ggml/src|ggml/src/ggml-cpu|include|src|common|vendor/nlohmann|vendor/sheredom|tools/quantize)/"
    r"[\w.-]*\w"
)
TIMEOUT = 60.0  # seconds without a byte
CHUNK = 1 << 20
OFFLINE_HINT = "Download {} by hand and build with tools/llama_cpp/build.py --source, or convert with --engine torch."

Log = Callable[[str], None]


@dataclass(frozen=True)
class Pinned:
    """The llama.cpp that is built, from pinned.json.

    Attributes:
        llama_cpp: its release tag.
        ggml: version of the ggml in it.
        package: name of the source archive's package on the index.
        archive: file name of the archive.
        sha256: the archive's hash.
        ziglang: version of the compiler package that stands in where there is no compiler.
        flags: what every compiler is told, beside include paths and definitions.
    """

    llama_cpp: str
    ggml: str
    package: str
    archive: str
    sha256: str
    ziglang: str
    flags: tuple[str, ...]


def read_pinned(folder: Path = BUILD_FOLDER) -> Pinned:
    """The pin of this version of the pack."""
    fields = json.loads((folder / "pinned.json").read_text(encoding="utf-8"))
    return Pinned(**{**fields, "flags": tuple(fields["flags"])})


PINNED = read_pinned()


class _Links(html.parser.HTMLParser):
    """Collects the href of every link of an index page."""

    def __init__(self) -> None:
        super().__init__()
        self.hrefs: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Called for each tag of the page."""
        self.hrefs += [value for name, value in attrs if tag == "a" and name == "href" and value]


def package_settings() -> dict[str, str]:
    """pip's settings by name, as `index-url`; variables of uv stand in where pip has none."""
    found: dict[str, tuple[int, str]] = {}
    command = [sys.executable, "-m", "pip", "config", "list"]
    listed = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    for section, name, value in re.findall(r"^([\w:]+)\.([\w-]+)='(.*)'$", listed, re.MULTILINE):
        rank = {"global": 1, "install": 2, ":env:": 3}.get(section, 0)
        if rank > found.get(name, (0, ""))[0]:
            found[name] = (rank, value)
    settings = {name: value for name, (_, value) in found.items()}
    for name, variables in (
        ("index-url", ("PIP_INDEX_URL", "UV_DEFAULT_INDEX", "UV_INDEX_URL")),
        ("extra-index-url", ("PIP_EXTRA_INDEX_URL", "UV_INDEX", "UV_EXTRA_INDEX_URL")),
    ):
        set_ones = [os.environ[variable] for variable in variables if os.environ.get(variable)]
        if set_ones:
            settings.setdefault(name, set_ones[0])
    return settings


def index_urls(settings: dict[str, str]) -> list[str]:
    """Package indexes in the order in which they are asked; uv writes some as name=url."""
    words = [settings.get("index-url") or DEFAULT_INDEX, *settings.get("extra-index-url", "").split()]
    return [re.sub(r"^[\w-]+=(?=\w+://)", "", word).rstrip("/") for word in words]


def _request(url: str, accept: str) -> urllib.request.Request:
    """A request for a URL; a name and password in it become a header, as urllib does not understand them."""
    parts = urllib.parse.urlsplit(url)
    user, at, host = parts.netloc.rpartition("@")
    request = urllib.request.Request(urllib.parse.urlunsplit(parts._replace(netloc=host)), headers={"Accept": accept})
    if at:
        token = base64.b64encode(urllib.parse.unquote(user).encode()).decode()
        request.add_unredirected_header("Authorization", f"Basic {token}")
    return request


def _opener(settings: dict[str, str]) -> urllib.request.OpenerDirector:
    """Opens URLs with the certificates and the proxy that pip is told to use."""
    context = ssl.create_default_context(cafile=settings.get("cert") or None)
    handlers: list[urllib.request.BaseHandler] = [urllib.request.HTTPSHandler(context=context)]
    if settings.get("proxy"):
        handlers.append(urllib.request.ProxyHandler({"http": settings["proxy"], "https": settings["proxy"]}))
    return urllib.request.build_opener(*handlers)


def find_archive(index: str, opener: urllib.request.OpenerDirector) -> str | None:
    """URL of the pinned archive on one index, None if it has none. Reads the HTML form, which every index has."""
    page = f"{index}/{PINNED.package}/" + ("index.html" if index.startswith("file:") else "")
    with opener.open(_request(page, "text/html"), timeout=TIMEOUT) as answer:
        links = _Links()
        links.feed(answer.read().decode("utf-8", errors="replace"))
    for href in links.hrefs:
        url = urllib.parse.urldefrag(urllib.parse.urljoin(page, href)).url
        if PurePosixPath(urllib.parse.unquote(urllib.parse.urlsplit(url).path)).name == PINNED.archive:
            return url
    return None


def _download(url: str, path: Path, opener: urllib.request.OpenerDirector) -> None:
    with opener.open(_request(url, "*/*"), timeout=TIMEOUT) as answer, open(path, "wb") as file:
        shutil.copyfileobj(answer, file, CHUNK)


def fetch_archive(log: Log) -> Path:
    """The pinned archive in the cache folder, downloaded if it is not there.

    Raises:
        BuildError: no index has it, the network fails, or what came is not the pinned file.
    """
    kept = cache_folder() / PINNED.archive
    if kept.is_file() and file_hash(kept) == PINNED.sha256:
        return kept
    settings = package_settings()
    opener, reasons = _opener(settings), []
    kept.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=kept.parent, prefix="fetching-") as folder:
        part = Path(folder) / PINNED.archive
        for index in index_urls(settings):
            try:
                url = find_archive(index, opener)
                if url is None:
                    raise FileNotFoundError("it has no such file")
                log(f"Downloading the source of llama.cpp {PINNED.llama_cpp} ({PINNED.archive})")
                _download(url, part, opener)
            except (OSError, HTTPException, ValueError) as error:
                reasons.append(f"{urllib.parse.urlsplit(index).hostname or index}: {error}")
                continue
            check_archive(part)
            part.replace(kept)
            return kept
    hint = OFFLINE_HINT.format(PINNED.archive)
    raise BuildError(f"{PINNED.archive} cannot be downloaded ({'; '.join(reasons)})", hint=hint)


def file_hash(path: Path) -> str:
    """sha256 of a file in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def check_archive(path: Path) -> None:
    """Refuse an archive that is not, byte for byte, the pinned one.

    Raises:
        BuildError: it cannot be read or has another hash.
    """
    try:
        found = file_hash(path)
    except OSError as error:
        raise BuildError(f"the archive cannot be read: {error.strerror}", path=path, hint="Check --source.") from error
    if found != PINNED.sha256:
        hint = f"Get {PINNED.archive} again; nothing of this file was used."
        raise BuildError(f"it has sha256 {found}, expected {PINNED.sha256}", path=path, hint=hint)


def prepare_source(given: Path | None, folder: Path, log: Log) -> Path:
    """Put the sources that a build reads into a folder and patch them.

    Args:
        given: an archive, a folder with llama.cpp, or None for the pinned archive of the cache or the index.
        folder: an empty folder.
    Returns:
        folder.
    Raises:
        BuildError: nothing to take, another archive than the pinned one, or the patch does not fit.
    """
    if given is not None and given.is_dir():
        _copy_needed(given, folder)
    else:
        archive = given or fetch_archive(log)
        check_archive(archive)
        _unpack_needed(archive, folder)
    if not (folder / "ggml" / "src" / "ggml-quants.c").is_file():
        raise BuildError("there is no llama.cpp in it", path=given, hint=f"Give llama.cpp {PINNED.llama_cpp}.")
    apply_patch(PATCH.read_text(encoding="utf-8"), folder)
    return folder


def _unpack_needed(archive: Path, folder: Path) -> None:
    """Write the needed files; only regular files whose path NEEDED spells out, so nothing can land elsewhere."""
    with tarfile.open(archive) as tar:
        for member in tar:
            inner = member.name.partition("/llama.cpp/")[2]
            if member.isfile() and NEEDED.fullmatch(inner):
                target = folder / inner
                target.parent.mkdir(parents=True, exist_ok=True)
                content = tar.extractfile(member)
                if content is not None:
                    target.write_bytes(content.read())


def _copy_needed(given: Path, folder: Path) -> None:
    """Copy the needed files of a folder: llama.cpp itself, or the unpacked archive with llama.cpp in it."""
    root = given / "llama.cpp" if (given / "llama.cpp").is_dir() else given
    for path in root.rglob("*"):
        inner = path.relative_to(root).as_posix()
        if path.is_file() and NEEDED.fullmatch(inner):
            (folder / inner).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, folder / inner)


def apply_patch(patch: str, folder: Path) -> None:
    """Apply a unified diff with every line at its stated place; nothing is changed where any hunk does not fit.

    Args:
        patch: files as `--- a/name` and `+++ b/name`; existing files only.
        folder: root of the names.
    Raises:
        BuildError: a file is missing, or a line of it is not what the patch says.
    """
    changed = {}
    for name, hunks in _split_patch(patch).items():
        path = folder / name
        try:
            lines = path.read_bytes().decode("utf-8").replace("\r\n", "\n").split("\n")
        except OSError as error:
            raise BuildError(f"the patch changes {name}, which is not there", path=folder) from error
        shift = 0
        for start, old, new in hunks:
            at = start - 1 + shift
            if lines[at : at + len(old)] != old:
                hint = f"Use llama.cpp {PINNED.llama_cpp}, unchanged."
                raise BuildError(f"line {start} of {name} is not what the patch expects", path=folder, hint=hint)
            lines[at : at + len(old)] = new
            shift += len(new) - len(old)
        changed[path] = "\n".join(lines).encode("utf-8")
    for path, content in changed.items():
        path.write_bytes(content)


def _split_patch(patch: str) -> dict[str, list[tuple[int, list[str], list[str]]]]:
    """File name -> hunks (first line, old lines, new lines); lines outside the counts of a hunk are refused."""
    files: dict[str, list[tuple[int, list[str], list[str]]]] = {}
    lines = iter(patch.replace("\r\n", "\n").rstrip("\n").split("\n"))
    hunks: list[tuple[int, list[str], list[str]]] = []
    for line in lines:
        header = re.match(r"@@ -(\d+)(?:,(\d+))? \+\d+(?:,(\d+))? @@", line)
        if line.startswith("+++ b/"):
            hunks = files.setdefault(line.removeprefix("+++ b/"), [])
        elif header:
            n_old, n_new = (int(header[group] or 1) for group in (2, 3))
            old: list[str] = []
            new: list[str] = []
            while len(old) < n_old or len(new) < n_new:
                text = next(lines, "end of the patch")
                if text[:1] not in ("", " ", "-", "+"):
                    raise BuildError(f"a hunk ends early at {text[:40]!r}", path=PATCH)
                old += [text[1:]] * (text[:1] != "+")
                new += [text[1:]] * (text[:1] != "-")
            hunks.append((int(header[1]), old, new))
        elif not line.startswith("--- a/"):
            raise BuildError(f"{line[:40]!r} is no part of a patch", path=PATCH)
    return files
