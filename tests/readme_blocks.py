# SPDX-License-Identifier: Apache-2.0
"""The parts of the README that scripts write: what stands between a pair of markers."""


def replace_between(text: str, begin: str, end: str, written: str) -> str:
    """A text with what a script wrote between two markers.

    Raises:
        SystemExit: there are no markers.
    """
    head, found_begin, rest = text.partition(begin)
    _, found_end, tail = rest.partition(end)
    if not found_begin or not found_end:
        raise SystemExit(f"README.md has no {begin} and {end}")
    return f"{head}{begin}\n{written}\n{end}{tail}"
