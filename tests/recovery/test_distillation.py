"""The distance from a teacher, and what a recording of the teacher keeps of it."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hf_lrq.errors import RecoveryError
from hf_lrq.recovery import RecordedTeacher, record_teacher
from hf_lrq.recovery.distillation import coarse_divergence, distances
from hf_lrq.recovery.teacher import LiveTeacher, as_teacher, file_of, tokens_of, top_log_probs


def some_logits(generator: torch.Generator, vocabulary: int = 11) -> tuple[Tensor, Tensor]:
    student, teacher = torch.randn(2, 7, vocabulary, generator=generator)
    return student, 2 * teacher


def full_divergence(student: Tensor, teacher: Tensor) -> Tensor:
    return F.kl_div(student.log_softmax(-1), teacher.log_softmax(-1), log_target=True, reduction="batchmean")


def test_with_all_tokens_it_is_the_divergence(generator: torch.Generator) -> None:
    student, teacher = some_logits(generator)
    # What is left for "any other token" is rounding, and counts as 1e-6.
    found = coarse_divergence(student, *top_log_probs(teacher, 11))
    torch.testing.assert_close(found, full_divergence(student, teacher), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("k", [1, 2, 5, 10])
def test_fewer_tokens_see_less_of_it(generator: torch.Generator, k: int) -> None:
    """Merging outcomes loses information (data processing inequality)."""
    student, teacher = some_logits(generator)
    found = coarse_divergence(student, *top_log_probs(teacher, k))
    assert 0 < found < full_divergence(student, teacher)


def test_a_student_that_agrees_has_no_distance(original: Any, batches: list[Tensor]) -> None:
    teacher = LiveTeacher(original(), 8)
    divergence, hidden, positions = distances(original(), batches[0], teacher.targets(batches[0]))
    assert abs(divergence.item()) < 1e-5
    assert hidden.item() == 0
    assert positions == tokens_of(batches[0]) == 34


def test_mass_that_moves_to_other_tokens_is_noticed() -> None:
    teacher = torch.zeros(1, 6)
    teacher[0, :2] = 5
    student = teacher.clone()
    student[0, 5] = 6  # Among the top two, nothing changed.
    assert coarse_divergence(student, *top_log_probs(teacher, 2)) > 0.5


def test_padding_is_left_out(original: Any, compressed: Any, batches: list[Tensor]) -> None:
    ids = batches[0]
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0
    batch = {"input_ids": ids, "attention_mask": mask, "labels": ids}
    other = {**batch, "input_ids": torch.where(mask == 1, ids, (ids + 5) % 96)}
    teacher = LiveTeacher(original(), 8)
    student = compressed()
    assert tokens_of(batch) == 17 + 9
    for found, expected in zip(
        distances(student, batch, teacher.targets(batch)),
        distances(student, other, teacher.targets(other)),
        strict=True,
    ):
        torch.testing.assert_close(found, expected)


def test_a_recording_says_what_the_teacher_says(original: Any, batches: list[Tensor], tmp_path: Path) -> None:
    recorded = record_teacher(original(), batches[:3], tmp_path / "new" / "folder", top_k=5)
    live = LiveTeacher(original(), 5)
    for batch in batches[:3]:
        found, expected = recorded.targets(batch), live.targets(batch)
        torch.testing.assert_close(found.log_probs, expected.log_probs, rtol=0, atol=0)
        assert torch.equal(found.tokens, expected.tokens)
        torch.testing.assert_close(found.hidden.float(), expected.hidden, rtol=1e-3, atol=1e-3)  # float16
    assert isinstance(as_teacher(str(tmp_path / "new" / "folder"), 5), RecordedTeacher)


def test_recording_goes_on_where_it_stopped(original: Any, batches: list[Tensor], tmp_path: Path) -> None:
    record_teacher(original(), batches[:2], tmp_path)
    times = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert {path.name for path in times} == {file_of(batch) for batch in batches[:2]}
    record_teacher(original(), batches[:3], tmp_path)
    assert len(list(tmp_path.iterdir())) == 3
    assert all(path.stat().st_mtime_ns == before for path, before in times.items())


def test_other_batches_are_not_found_in_a_recording(original: Any, batches: list[Tensor], tmp_path: Path) -> None:
    recorded = record_teacher(original(), batches[:1], tmp_path)
    with pytest.raises(RecoveryError, match="no outputs of the teacher for a batch of 34 tokens"):
        recorded.targets(batches[1])


def test_what_is_no_teacher_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecoveryError, match="There is no folder"):
        as_teacher(tmp_path / "absent", 4)
    with pytest.raises(RecoveryError, match="got int"):
        as_teacher(3, 4)
