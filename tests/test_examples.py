"""The examples run, and train as a loop does that is written by hand: whole logits, in float64."""

import importlib.util
import json
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tiny_lms import tiny, tokenizer
from transformers import AutoModelForCausalLM

EXAMPLES = Path(__file__).parents[1] / "examples"
LINES = [" ".join(f"w{(7 * i + j) % 60}" for j in range(3 + 4 * (i % 3))) for i in range(8)]


@pytest.fixture
def names(tmp_path):
    """The folders of two models whose distributions differ."""
    folders = [tmp_path / name for name in ("student", "teacher")]
    for seed, folder in enumerate(folders):
        tiny(seed, initializer_range=0.3).save_pretrained(folder)
        tokenizer().save_pretrained(folder)
    return [str(folder) for folder in folders]


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))

    def load(name):
        spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture
def lines(tmp_path):
    path = tmp_path / "lines.txt"
    path.write_text("\n".join(LINES))
    return path


def sgd(parameters, lr):
    """Without Adam's division, in which a rounding of a gradient near 0 becomes a step."""
    return torch.optim.SGD(parameters, lr=0.5)


def by_hand(names, steps, temperature=1.0, alpha=1.0, num_items=None):
    """(the loss of each step, the weights after them); a step is a list of lines."""
    student, teacher = (AutoModelForCausalLM.from_pretrained(x).double() for x in names)
    T, losses = temperature, []
    for lines in steps:
        total = n = 0
        for line in lines:
            ids = tokenizer()(line, return_tensors="pt")["input_ids"]
            z = student(ids).logits[:, :-1].flatten(0, 1)
            with torch.no_grad():
                p = (teacher(ids).logits[:, :-1].flatten(0, 1) / T).softmax(-1)
            kd = T**2 * F.kl_div((z / T).log_softmax(-1), p, reduction="sum")
            ce = F.cross_entropy(z, ids[0, 1:], reduction="sum")
            total = total + alpha * kd + (1 - alpha) * ce
            n += len(z)
        loss = total / (num_items or n)
        student.zero_grad()
        loss.backward()
        with torch.no_grad():
            for p in student.parameters():
                p -= 0.5 * p.grad
        losses.append(loss.item())
    return losses, weights(student)


def weights(model):
    if not isinstance(model, torch.nn.Module):
        model = AutoModelForCausalLM.from_pretrained(model)
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def assert_moved_as(output, expected, names):
    start, ours = weights(names[0]), weights(output)
    assert (expected - start).norm() > 0.1
    assert (ours - expected).norm() < 1e-5 * (expected - start).norm() + 1e-6


def test_plain(example, names, lines, tmp_path):
    losses = example("plain").main(names, lines, tmp_path / "out", size=4, optimizer=sgd)
    expected, after = by_hand(names, [LINES[:4], LINES[4:]], temperature=2.0, alpha=0.7)
    assert losses == pytest.approx(expected, rel=1e-5)
    assert_moved_as(tmp_path / "out", after, names)


def test_accelerate(example, names, lines, tmp_path, request):
    """Two steps of four micro-batches of unequal length."""
    from accelerate.state import AcceleratorState, GradientState

    for state in (AcceleratorState, GradientState):  # all accelerators of a process share them
        request.addfinalizer(state._reset_state)
    example("accelerate_loop").main(names, lines, tmp_path / "out", size=1, optimizer=sgd)
    _, after = by_hand(names, [LINES[:4], LINES[4:]], temperature=2.0)
    assert_moved_as(tmp_path / "out", after, names)


def test_lightning(example, names, lines, tmp_path):
    """Two micro-batches a step, divided by one number; the teacher is nowhere in what is saved."""
    pytest.importorskip("lightning")
    module = example("lightning_module")
    settings = dict(
        accelerator="cpu", default_root_dir=tmp_path, logger=False, enable_progress_bar=False,
        enable_model_summary=False, accumulate_grad_batches=2,
    )  # fmt: skip
    module.main(names, lines, tmp_path / "out", size=2, num_items=10, optimizer=sgd, **settings)
    _, after = by_hand(names, [LINES[:4], LINES[4:]], num_items=20)
    assert_moved_as(tmp_path / "out", after, names)
    (path,) = tmp_path.rglob("*.ckpt")
    saved = torch.load(path, weights_only=False)["state_dict"]
    assert saved and all(name.startswith("student.") for name in saved)


@pytest.mark.filterwarnings("ignore:You are importing from 'trl.experimental'")
def test_trl(example, names, tmp_path, monkeypatch):
    """The same losses and weights as without fastkd."""
    pytest.importorskip("trl")
    path, module = tmp_path / "conversations.jsonl", example("trl_gkd")
    rows = [
        [dict(role="user", content=question), dict(role="assistant", content=answer)]
        for question, answer in zip(LINES, LINES[1:] + LINES[:1], strict=True)
    ]
    path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")

    def run(output):
        trainer = module.main(
            names, str(path), str(tmp_path / output), max_steps=2, lmbda=0.0, optim="sgd",
            learning_rate=0.5, logging_steps=1, report_to=[], save_strategy="no", use_cpu=True,
            bf16=False, disable_tqdm=True, max_length=64,
        )  # fmt: skip
        return [x["loss"] for x in trainer.state.log_history if "loss" in x]

    losses = run("fused")
    monkeypatch.setattr(module, "fused", nullcontext)
    assert losses == pytest.approx(run("trl"), rel=1e-5)
    assert_moved_as(tmp_path / "fused", weights(tmp_path / "trl"), names)


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_short(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 40
