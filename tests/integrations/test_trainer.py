"""Distillation in Hugging Face's Trainer: its numbers are those of a single big batch."""

import pytest
from trainer_truth import norm, rows, tiny, trainer_of, truth


@pytest.mark.parametrize("size, accumulation", [(16, 1), (4, 4), (2, 8), (7, 3)])
def test_a_step_is_that_of_its_whole_batch(tmp_path, size, accumulation):
    """However it is cut: one micro-batch has no target, the last of three is not full."""
    cut = dict(per_device_train_batch_size=size, gradient_accumulation_steps=accumulation)
    trainer = trainer_of(tmp_path, arguments=cut)
    trainer.train()
    student = tiny(0)
    expected = truth(student, tiny(1), rows())
    expected["grad_norm"] = norm(student).item()
    line = trainer.state.log_history[0]
    for name in ("loss", "kd", "ce", "top1_agreement", "grad_norm"):
        assert line[name] == pytest.approx(expected[name], rel=1e-5), name


def test_evaluation_is_over_tokens(tmp_path):
    """Seven rows in batches of two, of unequal targets."""
    data = rows()[:7]
    trainer = trainer_of(tmp_path, eval_dataset=data)
    found = trainer.evaluate()
    expected = truth(tiny(0), tiny(1), data)
    for name in ("loss", "kl", "perplexity", "top1_agreement"):
        assert found[f"eval_{name}"] == pytest.approx(expected[name], rel=1e-5), name
