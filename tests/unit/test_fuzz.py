# SPDX-License-Identifier: Apache-2.0
"""The first cases of the fuzzer (tests/fuzz/run.py, which runs for as long as wanted), and what it has found so far."""

import multiprocessing
from pathlib import Path

import pytest
from fuzz import planted, run
from fuzz.mutate import Fields
from fuzz.targets import TARGETS
from gguf import GGMLQuantizationType as QType
from gguf_kit.errors import BadFile
from gguf_kit.quantize import imatrix

F32, BF16 = int(QType.F32), int(QType.BF16)
SEED = 5
N_CASES = 60  # of each target


def outcomes(folder, targets, name, numbers):
    """number -> (outcome, text) of some cases of a target."""
    found, sound = {}, targets[name].make()
    for number in numbers:
        path = folder / f"case-{number}{targets[name].suffix}"
        path.write_bytes(run.case_bytes(name, sound, SEED, number))
        found[number] = run.run_case(targets[name], path)
    return found


@pytest.mark.parametrize("name", TARGETS)
def test_sound_files_are_read(tmp_path, name):
    for i, content in enumerate(TARGETS[name].make()):
        path = tmp_path / f"sound-{i}{TARGETS[name].suffix}"
        path.write_bytes(content if isinstance(content, bytes) else content.write())
        TARGETS[name].read(path)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", TARGETS)
def test_damaged_files_are_read_or_refused_by_name(tmp_path, name):
    found = outcomes(tmp_path, TARGETS, name, range(N_CASES))
    bad = {number: outcome for number, outcome in found.items() if outcome[0] not in ("read", "refused")}
    assert not bad
    assert {kind for kind, _ in found.values()} == {"read", "refused"}


def test_a_seed_and_a_number_give_the_same_file():
    sound = TARGETS["tokenizer"].make()
    first = [run.case_bytes("tokenizer", sound, SEED, number) for number in range(20)]
    assert [run.case_bytes("tokenizer", sound, SEED, number) for number in range(20)] == first
    assert len({*first}) > 15
    assert all(fields.write() == TARGETS["tokenizer"].make()[i].write() for i, fields in enumerate(sound))
    assert all(isinstance(fields, Fields) for fields in sound)


@pytest.mark.parametrize("kind", ["read", "refused", "unnamed file", "error", "memory", "slow"])
def test_the_fuzzer_tells_what_a_reader_does(tmp_path, kind, monkeypatch):
    monkeypatch.setattr(run, "HANG_CPU_SECONDS", planted.SLOW_CPU_SECONDS / 2 if kind == "slow" else 10)
    if kind == "memory" and not run.RESET.exists():
        pytest.skip("this system does not tell the peak of a process's memory")
    [(outcome, text)] = outcomes(tmp_path, planted.TARGETS, kind, [0]).values()
    assert outcome == kind
    assert ("KeyError at planted.py" in text) == (kind == "error")


def test_the_fuzzer_survives_crashes_and_hangs_and_keeps_their_files(tmp_path, capsys):
    names = ["read", "crash", "hang"]
    campaign = run.Campaign(SEED, names, tmp_path / "kept", module="fuzz.planted", patience=0.5)
    campaign.run(60, enough=3)  # a second crash: the worker was started again
    kinds = [(finding.target, finding.kind) for finding in campaign.findings[:3]]
    assert kinds == [("crash", "crash"), ("hang", "hang"), ("crash", "crash")]
    assert campaign.outcomes["read", "read"] >= 2
    kept = {path.name: path.read_bytes() for path in (tmp_path / "kept").iterdir()}
    assert kept["crash-1.bin"] == run.case_bytes("crash", [b"content"], SEED, 1)
    assert "findings" in campaign.summary()
    assert "hang 2: hang" in capsys.readouterr().out
    assert not multiprocessing.active_children()


# -- what it has found --


def test_rows_of_an_importance_matrix_without_dimensions_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "scalar.gguf"
    tensors = [("a.in_sum2", F32, (1, 1), bytes(4)), ("a.counts", F32, (1,), bytes(4)), ("a.rows", BF16, (), bytes(2))]
    path.write_bytes(Fields({}, tensors).write())
    with pytest.raises(BadFile, match=r"^scalar\.gguf: the entry of 'a' has rows of shape \(\), expected two"):
        imatrix.read_imatrix(path)
