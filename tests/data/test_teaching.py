"""What a teacher said is found again by row number, goes on where writing was cut off, and is not believed where it is damaged."""

import numpy as np
import pytest

from data.teaching import ROWS, TeacherTargets

SEQ, K = 5, 3
MADE_FROM = {"teacher": "a", "tokens": ["train-1"], "temperature": 1.0}


def said(first: int):
    rng = np.random.default_rng(first)
    ids = rng.integers(0, 90, (ROWS, SEQ, K)).astype(np.int32)
    return ids, rng.normal(size=(ROWS, SEQ, K + 1)).astype(np.float16)


def test_rows_are_found_across_parts_and_writing_goes_on(tmp_path):
    targets = TeacherTargets(tmp_path, MADE_FROM, seq=SEQ, k=K)
    assert targets.missing(2 * ROWS + 1) == [0, ROWS, 2 * ROWS]
    targets.write(0, *said(0))
    again = TeacherTargets(tmp_path, MADE_FROM, seq=SEQ, k=K)
    assert again.missing(2 * ROWS) == [ROWS]
    again.write(ROWS, *said(ROWS))
    ids, log_probs = again.rows(ROWS - 2, ROWS + 1)
    np.testing.assert_array_equal(ids, np.concatenate([said(0)[0][-2:], said(ROWS)[0][:1]]))
    np.testing.assert_array_equal(log_probs, np.concatenate([said(0)[1][-2:], said(ROWS)[1][:1]]))
    written = sum(file.stat().st_size for file in again.folder.glob("*/*.bin"))
    assert written == again.bytes_of(2 * ROWS) == again.bytes_of(ROWS + 1)


def test_another_teacher_or_other_rows_are_other_targets(tmp_path):
    targets = TeacherTargets(tmp_path, MADE_FROM, seq=SEQ, k=K)
    targets.write(0, *said(0))
    for changed in ({"teacher": "b"}, {"tokens": ["train-2"]}, {"temperature": 2.0}):
        assert TeacherTargets(tmp_path, MADE_FROM | changed, seq=SEQ, k=K).missing(1) == [0]
    assert TeacherTargets(tmp_path, MADE_FROM, seq=SEQ, k=K + 1).missing(1) == [0]
    assert TeacherTargets(tmp_path, MADE_FROM, seq=SEQ, k=K).missing(1) == []


def test_a_damaged_part_is_asked_for_again(tmp_path):
    targets = TeacherTargets(tmp_path, MADE_FROM, seq=SEQ, k=K)
    targets.write(0, *said(0))
    ids = targets.folder / "rows-00000000" / "ids.bin"
    raw = bytearray(ids.read_bytes())
    raw[7] ^= 1
    ids.write_bytes(raw)
    again = TeacherTargets(tmp_path, MADE_FROM, seq=SEQ, k=K)
    with pytest.raises(ValueError, match="SHA-256 differs"):
        again.rows(0, 1)
    assert again.missing(1) == [0]
    again.write(0, *said(0))
    np.testing.assert_array_equal(again.rows(3, 4)[0][0], said(0)[0][3])


def test_a_part_of_another_size_is_refused(tmp_path):
    targets = TeacherTargets(tmp_path, MADE_FROM, seq=SEQ, k=K)
    ids, log_probs = said(0)
    with pytest.raises(ValueError, match=r"a part has ids \(64, 5, 3\) and log_probs \(64, 5, 4\) from a multiple of 64 on"):
        targets.write(0, ids, log_probs[..., :-1])
    with pytest.raises(ValueError, match=r"from a multiple of 64 on, got .* from row 3 on"):
        targets.write(3, ids, log_probs)
