# SPDX-License-Identifier: Apache-2.0
"""The tables of speeds are the ones that the benchmarks' records make."""

import make_bench_table
import pytest

TIMING = {"ms": 100.0, "p20": 90.0, "p80": 110.0, "n": 5}
MACHINE = {"device": "a processor", "threads": 2, "torch": "2.14.1"}


def against(**times):
    return {name.replace("_", " "): {"ms": 1.0, "time": time} for name, time in times.items()}


def record(bench, name, **fields):
    return {"bench": bench, "name": name, **fields, **TIMING, **MACHINE}


def test_the_tables_are_up_to_date():
    results = make_bench_table.read_results()
    pages = {make_bench_table.PAGE: make_bench_table.make_tables(results)}
    pages |= dict.fromkeys(make_bench_table.READMES, make_bench_table.make_short_tables(results))
    for page, tables in pages.items():
        text = page.read_text(encoding="utf-8")
        assert make_bench_table.replace_block(text, tables) == text, "python tests/make_bench_table.py"


def test_of_backends_the_fastest_is_shown_and_memory_that_is_there_goes_before_fresh():
    ratios = against(straight_torch=0.1, ggml_C=0.8, copy=2.5)
    dequant = {"bench": "bench_dequant", "qtype": "Q4_K", "dtype": "float32", "against": ratios}
    rows = [
        record(name="torch", memory="fresh", mweights_per_s=900.0, **dequant),
        record(name="slow", memory="given", mweights_per_s=100.0, **dequant),
        record(name="llvm", memory="given", mweights_per_s=400.0, **dequant),
        record(name="copy", memory="given", mweights_per_s=9000.0, **dequant),
        record(name="wrong", memory="given", mweights_per_s=9000.0, result="FAIL: 1", **dequant),
    ]
    table = make_bench_table.dequant_table(rows)
    assert table.splitlines()[-1] == "| Q4_K | 400 | 10.0 | 1.2 | 40 % |"


def test_the_rest_has_lines_for_layers_steps_loras_and_loading():
    dense = against(dense=1.08)
    rows = [
        record("bench_linear", "dense", shape=[3072, 12288], dtype="float32", tokens=512),
        record("bench_linear", "GGUF Linear", qtype="Q4_K", shape=[3072, 12288], dtype="float32", tokens=512)
        | {"against": dense},
        record("bench_step", "GGUF", model="pair", qtype="Q4_K", dtype="float32", tokens=512, against=dense),
        record("bench_lora", "step", qtype="Q4_K", dtype="float32", tokens=512, rank=32, loras=4)
        | {"against": against(without=1.1)},
        record("bench_load", "full", seconds=0.5, resident_added_mb=9.2, gb=6.8),
        record("bench_load", "added", seconds=0.3),
    ]
    assert make_bench_table.rest_table(rows).splitlines()[2:] == [
        "| Linear 3072x12288, float32, 512 tokens | Q4_K 1.08 of dense |",
        "| a step of two blocks as wide as Flux, Q4_K, float32, 512 tokens | 0.1 s, 1.08 of dense |",
        "| the two blocks with 4 LoRAs of rank 32, float32, 512 tokens | 1.10 of without |",
        "| loading a Flux.1-dev of 6.8 GB | 0.50 s, 0.30 s of it the pack's; 9.2 MB before the first forward |",
    ]


def test_a_page_without_the_markers_is_an_error():
    with pytest.raises(SystemExit, match="has no"):
        make_bench_table.replace_block("# Title", "")
