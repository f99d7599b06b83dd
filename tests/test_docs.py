"""README and docs are true: their code runs, tables and picture are the saved results, links and
commands exist and can be read.

The Python blocks of a page are one program, run from top to bottom with the names of `names()`. A
block under `<!-- needs: PACKAGE -->` runs where the package is; one under `<!-- not run: why -->`
does not, and is counted.
"""

import copy
import importlib.util
import re
import shlex
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


def gradient(batches, student=None, **settings):
    """Of whole logits, summed over the batches."""
    student, teacher = student or tiny(0), tiny(1)
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
    """The trainer has trained; two models through `sources` get the gradient of whole logits."""
    assert after["trainer"].state.global_step == 3
    trained = copy.deepcopy(after["student"])
    assert not torch.equal(flat(trained.parameters()), flat(tiny(0).parameters()))
    trained.zero_grad()
    expected = gradient([batch_of(rows())], trained, temperature=2.0, alpha=0.7)
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


def test_tables_of_results_that_are_to_come(monkeypatch):
    """Whole steps and TRL's losses, in the form that their benchmarks save."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import table

    measured = [
        dict(model=model, tokens=tokens, provider=kind, median=tokens / x, peak_mb=1000.0 * x)
        for model, tokens in (("smollm2", 256), ("gemma3", 256), ("gemma3", 512), ("gemma3", 1024))
        for x, kind in enumerate(("fastkd", "whole", "naive"), 1)
    ]
    machine = dict(device="a CPU", threads=2, torch="2")
    result = dict(machine_info=machine, steps=measured)
    monkeypatch.setattr(table, "load", lambda name: result if name == "step" else None)
    page = table.rendered("<!-- results: step --><!-- end -->")
    name = table.MODELS["gemma3"]
    row = "| 512 | 170.7 s | 256.0 s | 512.0 s | 0.3 | 3.0 GB | 2.0 GB | 1.0 GB |"
    assert f"| {name} {row}" in page and page.count("\n| Gemma") == 3
    short = table.rendered("<!-- results: step short --><!-- end -->")
    assert "| 1,024 | 341.3 s | **1,024.0 s** |" in short
    assert short.count("GB → 1.0 GB") == 3 and "| 512 |" not in short
    assert "Not measured yet." in table.rendered("<!-- results: gpu --><!-- end -->")
    same = dict(
        table="trl", loss="f", rows=2, V=5, beta=0.5, temperature=1.0, dtype="torch.float32"
    )
    entries = [
        same | dict(provider=kind, median=x, floor_seconds=1.0, peak_bytes=2**20)
        for kind, x in (("trl", 4.0), ("fastkd", 2.0))
    ]
    row = "| `f` | 2 × 5 | 0.5 | 1 | 4,000.0 ms | 2,000.0 ms | 1,000.0 ms | 2.0 | 1 MB → 1 MB |"
    assert row in table.trl(entries)


def test_commands_exist():
    makefile = (ROOT / "Makefile").read_text()
    for command in ("distill", "test", "bench", "tables"):
        assert f"`make {command}" in README or f"\nmake {command}" in README
    for page, text in PAGES.items():
        for target in re.findall(r"(?:`|^)make ([a-z][\w-]*)", text, flags=re.MULTILINE):
            assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), f"{page}: make {target}"


def command_lines():
    """(page, what the shell gives to `fastkd`) of every command line in a block or in the text."""
    for page, text in PAGES.items():
        blocks = re.findall(r"^```(?:sh|bash)\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
        shown = "\n".join(blocks).replace("\\\n", " ").splitlines()
        rest = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
        for line in (*shown, *re.findall(r"`([^`]+)`", rest)):
            parts = shlex.split(line.replace("\n", " "), comments=True)
            if "fastkd" not in parts or {"pip", "clone"} & set(parts):
                continue
            arguments = parts[parts.index("fastkd") + 1 :]
            if arguments[:1] in (["distill"], ["generate"]) and "--help" not in arguments:
                yield page, arguments


def test_command_lines_are_understood(tmp_path):
    """No flag in README and docs is wrong, and no value."""
    from fastkd.training import build, config, settings

    lines = [(page, x) for page, x in command_lines() if len(x) > 1]
    assert len(lines) > 20
    for page, (command, *flags) in lines:
        files = {"--config": tmp_path / "none.yaml"}
        files["--config"].write_text("{}\n")
        read = [
            str(files.get(before, word)) for before, word in zip(["", *flags], flags, strict=False)
        ]
        if read[-1] == "…" and not read[-2].startswith("--"):  # the rest; after a flag, its value
            read.pop()
        try:
            if command == "generate":
                config.read(read, [settings.GenerateSettings], {})
                continue
            models, _, loss, *_ = config.parse(read)
            if models.teacher:
                build.check_settings(models, loss)
        except ValueError as error:
            raise AssertionError(
                f"{page}: fastkd {command} {shlex.join(flags)}: {error}"
            ) from error


def test_files_of_settings_are_understood(tmp_path):
    """A YAML block is a file for `--config`, or one for `accelerate launch`."""
    from accelerate.commands.config.config_args import load_config_from_file

    from fastkd.training import config

    found = []
    for page, text in PAGES.items():
        for block in re.findall(r"^```yaml\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE):
            file = tmp_path / f"{len(found)}.yaml"
            file.write_text(block, encoding="utf-8")
            accelerates = "compute_environment" in block
            found.append(accelerates)
            try:
                if accelerates:
                    load_config_from_file(str(file))
                else:
                    config.parse(["--config", str(file)])
            except ValueError as error:
                raise AssertionError(f"{page}: {error}") from error
    assert set(found) == {True, False}


def flags_in_text():
    """(page, words) of all others that a page names, but the history of what is gone."""
    for page, text in PAGES.items():
        if page == "CHANGELOG.md":
            continue
        rest = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
        for line in re.findall(r"`(--[^`]+)`", rest):
            yield page, shlex.split(line.replace("\n", " "))


def test_flags_exist():
    """`--flag` and `--flag value` in a sentence are read as those of `fastkd distill`, or of
    `fastkd generate`."""
    from fastkd.training import config, settings

    for page, line in flags_in_text():
        line = [word for word in line if word != "…"]
        bare = [i for i, x in enumerate(line) if x.startswith("--")]
        whole = line if all(i + 1 < len(line) for i in bare) and bare[-1] + 1 < len(line) else []
        for kinds, defaults in (
            ([*settings.GROUPS, config.TrainingArguments], settings.DEFAULTS),
            ([settings.GenerateSettings], {}),
        ):
            parser = config.Parser(kinds, prog="fastkd", allow_abbrev=False)
            known = {action.dest: action for action in parser._actions}
            try:
                for i in bare:
                    config._name(line[i].removeprefix("--").partition("=")[0], known)
                if whole and "--config" not in whole:
                    config.read(whole, kinds, defaults)
                break
            except ValueError as error:
                problem = error
        else:
            raise AssertionError(f"{page}: {shlex.join(line)}: {problem}")


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
