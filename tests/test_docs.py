"""README and docs are true: their code runs, tables and picture are the saved results, links and
commands exist.

The Python blocks of a page are one program, run from top to bottom with the names of `names()`. A
block under `<!-- needs: PACKAGE -->` runs where the package is; one under `<!-- not run: why -->`
does not, and is counted.
"""

import importlib.util
import re
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tiny_lms import V, tiny, words

import fastkd
from fastkd import kd_loss

ROOT = Path(__file__).parents[1]
PAGES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in (*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md")))
}
README, START = PAGES["README.md"], PAGES["docs/getting-started.md"]
NOT_RUN = 0


def rows():
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(V, (4, 12), generator=generator)
    labels = ids.clone()
    for row, prompt in enumerate((1, 9, 4, 10)):  # unequal targets
        labels[row, :prompt] = -100
    return [dict(input_ids=i, labels=y) for i, y in zip(ids, labels, strict=True)]


def batch_of(chosen):
    return {k: torch.stack([r[k] for r in chosen]) for k in ("input_ids", "labels")}


class Loader:
    """Two batches of unequal token counts, new ones each time: pages pop the labels."""

    def __iter__(self):
        return iter((batch_of(rows()[:2]), batch_of(rows()[2:])))


def names():
    """What pages may use without defining it."""
    generator = torch.Generator().manual_seed(1)

    def random(*shape):
        return torch.randn(*shape, generator=generator)

    return dict(
        student=tiny(0), teacher=tiny(1), other_teacher=tiny(2), tokenizer=words(), rows=rows(),
        loader=Loader(), batch=batch_of(rows()), labels=batch_of(rows())["labels"],
        student_logits=random(4, 12, V).requires_grad_(), teacher_logits=random(4, 12, V),
        other_logits=random(4, 12, V), longer_logits=random(4, 12, V + 3),
        hidden=random(4, 12, 16).requires_grad_(), weight=random(V, 16).requires_grad_(),
        teacher_hidden=random(4, 12, 24), teacher_weight=random(V, 24),
    )  # fmt: skip


def program(page):
    """(the page's Python, each line where it stands in the page; how many blocks are not run)."""
    code, not_run, marker, inside = [], 0, "", None
    for line in PAGES[page].splitlines():
        if inside is not None:
            inside = None if line.startswith("```") else inside
            code.append(line if inside else "")
            continue
        code.append("")
        if line.startswith("```python"):
            package = re.fullmatch(r"<!-- needs: (\w+) -->", marker)
            stays = marker.startswith("<!-- not run: ")
            not_run += stays
            inside = not stays and not (package and importlib.util.find_spec(package[1]) is None)
        elif line.startswith("```"):
            inside = False
        elif line:
            marker = line
    return "\n".join(code), not_run


def run(page, tmp_path):
    """The page's names after its program; a file, so that Triton finds its functions' source."""
    name = "page_" + re.sub(r"\W", "_", page.removesuffix(".md"))
    path = tmp_path / f"{name}.py"
    path.write_text(program(page)[0], encoding="utf-8")
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    vars(module).update(names())
    sys.modules[name] = module  # dataclasses look there
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules[name]
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    return vars(module)


@pytest.mark.parametrize("page", [page for page in PAGES if "```python" in PAGES[page]])
def test_code_runs(page, tmp_path, monkeypatch):
    """As one process of torchrun, for the page that shows shards; then what some pages promise."""
    launched = dict(RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    for key, value in launched.items():
        monkeypatch.setenv(key, value)
    monkeypatch.chdir(tmp_path)
    after = run(page, tmp_path)
    if page in PROMISES:
        PROMISES[page](after)


def test_few_blocks_are_not_run():
    assert sum(program(page)[1] for page in PAGES) == NOT_RUN
    for page, text in PAGES.items():  # one that is indented would be passed over
        assert text.count("```python") == len(re.findall("^```python", text, re.MULTILINE)), page


def gradient(batches, **settings):
    """Of whole logits, summed over the batches."""
    student, teacher = tiny(0), tiny(1)
    for batch in batches:
        labels = batch.pop("labels")
        with torch.no_grad():
            target = teacher(**batch, use_cache=False).logits
        logits = student(**batch, use_cache=False).logits
        kd_loss(logits, target, labels, shift=True, **settings).backward()
    return flat(p.grad for p in student.parameters())


def flat(tensors):
    return torch.cat([x.detach().flatten() for x in tensors])


def readme(after):
    """Two models through `sources` get the gradient of whole logits."""
    expected = gradient([batch_of(rows())], temperature=2.0, alpha=0.7)
    torch.testing.assert_close(flat(p.grad for p in after["student"].parameters()), expected)
    assert all(p.grad is None for p in after["teacher"].parameters())


def getting_started(after):
    """The loop, the step on logits and the accumulated batch, in one sum of gradients."""
    first, second = Loader()
    usual = dict(temperature=2.0, alpha=0.7)
    expected = gradient([first, second], **usual) + gradient([list(Loader())[1]], **usual)
    expected += gradient([batch_of(rows())])
    torch.testing.assert_close(flat(p.grad for p in after["student"].parameters()), expected)


def trainer(after):
    """Each of its trainers has trained the student, or would."""
    assert after["trainer"].state.global_step == 3
    assert not torch.equal(flat(after["student"].parameters()), flat(tiny(0).parameters()))


PROMISES = {
    "README.md": readme,
    "docs/getting-started.md": getting_started,
    "docs/trainer.md": trainer,
}


def test_before_and_after():
    """Both sides of the diff are the same loss and gradient."""
    (diff,) = re.findall(r"```diff\n(.*?)```", README, flags=re.DOTALL)
    results = []
    for sign in "-+":
        generator = torch.Generator().manual_seed(0)
        z, teacher = torch.randn(2, 20, V, generator=generator)
        z.requires_grad_()
        scope = dict(
            F=F, kd_loss=kd_loss, T=2.0, student_logits=z, teacher_logits=teacher,
            labels=torch.arange(20),
        )  # fmt: skip
        exec("\n".join(x[1:] for x in diff.splitlines() if x[0] == sign), scope)
        scope["loss"].backward()
        results.append((scope["loss"].detach(), z.grad))
    torch.testing.assert_close(*results)


def test_tables_and_picture_are_the_saved_results(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import picture
    import table

    cpu = table.load("cpu")
    for path in table.PAGES:
        page = path.read_text(encoding="utf-8")
        assert "<!-- results: " in page and table.rendered(page) == page, "run `make tables`"
    for scheme in picture.INK:
        drawn = picture.path_of(scheme).read_text(encoding="utf-8")
        assert drawn == picture.draw(cpu, scheme), "run `make tables`"


def test_commands_exist():
    makefile = (ROOT / "Makefile").read_text()
    for command in ("distill", "test", "bench", "tables"):
        assert f"`make {command}" in README or f"\nmake {command}" in README
    for page, text in PAGES.items():
        for target in re.findall(r"(?:`|^)make ([a-z][\w-]*)", text, flags=re.MULTILINE):
            assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), f"{page}: make {target}"


def test_rooms_exist():
    (rooms,) = re.findall(r"```text\nfastkd/\n(.*?)```", PAGES["docs/house.md"], flags=re.DOTALL)
    listed = re.findall(r"^  (\w+(?:\.py|/))", rooms, flags=re.MULTILINE)
    assert len(listed) > 10
    for name in listed:
        assert (ROOT / "fastkd" / name).exists(), name


def slugs(page):
    text = re.sub(r"```.*?```", "", PAGES[page], flags=re.DOTALL)
    titles = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES)
def test_links_exist(page):
    """Relative ones, with their headings; the API's own anchors are `mkdocs build --strict`'s."""
    text = re.sub(r"```.*?```", "", PAGES[page], flags=re.DOTALL)
    links = re.findall(r"\]\(([^)]+)\)", text) + re.findall(r'(?:src|srcset)="([^"]+)"', text)
    for link in links:
        target, _, anchor = link.partition("#")
        path = ((ROOT / page).parent / target).resolve() if target else ROOT / page
        assert path.is_file(), f"{page}: {link}"
        name = str(path.relative_to(ROOT))
        if anchor and name in PAGES and "." not in anchor:
            assert anchor in slugs(name), f"{page}: {link}"


def test_every_public_name_is_in_the_api():
    api = "".join(text for page, text in PAGES.items() if page.startswith("docs/api/"))
    for name in fastkd.__all__:
        assert re.search(rf"^::: fastkd\.{name}$", api, flags=re.MULTILINE), name
    named = {name for name in fastkd.__all__ if f"`{name}(" in PAGES["docs/losses.md"]}
    assert {type(d).__name__ for d in fastkd.divergences.examples()} <= named
