"""`fastkd distill` without arguments."""

import json
from pathlib import Path

from small import rows, weights, write_model
from test_run import fresh_process  # noqa: F401 - for each test

from fastkd import demo


def test_the_demonstration(tmp_path, monkeypatch, capsys):
    teacher = write_model(tmp_path / "teacher", 1, scale=50.0)
    texts = ["\n".join(row["completion"] for row in rows(24)).replace(" ", "\n") * 3] * 3
    monkeypatch.setattr(demo, "TEACHER", Path(teacher))
    monkeypatch.setattr(demo, "stdlib_texts", lambda held_out: texts)
    monkeypatch.setattr(demo, "PROMPT", "w1 w2")
    monkeypatch.setattr(demo, "LENGTH", 32)
    folder = tmp_path / "demo"
    results = demo.run(str(folder), steps=2)
    said = capsys.readouterr().out
    assert json.loads((folder / "results.json").read_text()) == results
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    alone, taught = (results["models"][name] for name in demo.NAMES[1:])
    assert f"{taught['perplexity']:.1f}" in said and f"{alone['kl']:.3f}" in said
    assert alone["kl"] != taught["kl"]
    assert f'AutoModelForCausalLM.from_pretrained("{folder}")' in said
    assert all(x.isfinite().all() for x in weights(folder).values())
    assert results["loss_peak_mb"]["naive"] > results["loss_peak_mb"]["fastkd"] > 0
    demo.run(str(folder), steps=1)  # in the place of the first
    assert json.loads((folder / "results.json").read_text()) != results
