"""Files are read as they are written, and what cannot be read is named."""

import gzip
import json

import pytest
from datasets import Dataset, DatasetDict

from fastkd.training.errors import InputError
from fastkd.training.files import load_rows

LINE = '{"text": "a"}\n'


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture
def write(tmp_path):
    def write(name, content):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        content = content.encode() if isinstance(content, str) else content
        path.write_bytes(content)
        return str(path)

    return write


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", LINE * 2),
        ("a.ndjson", LINE + "\n" + LINE),
        ("a.jsonl.gz", gzip.compress((LINE * 2).encode())),
        ("bom.jsonl", b"\xef\xbb\xbf" + (LINE * 2).encode()),
        ("array.json", '[{"text": "a"},\n {"text": "a"}]'),
        ("lines.json", LINE * 2),
        ("a.csv", "text\na\na\n"),
        ("index.csv", ",text\n0,a\n1,a\n"),
        ("a.tsv", 'text\n"a"\na\n'),
        # Names that are patterns, addresses or options to libraries.
        ("data[1].jsonl", LINE * 2),
        ("a*b?.jsonl", LINE * 2),
        ("x::y.jsonl", LINE * 2),
        ("a{b,c}.csv", "text\na\na\n"),
    ],
)
def test_kinds_and_names(name, content, write):
    assert load_rows(write(name, content)).to_list() == [{"text": "a"}] * 2


def test_kinds_that_the_library_reads(tmp_path):
    rows = Dataset.from_list([{"text": "a"}, {"text": "b"}])
    (tmp_path / "[v2]").mkdir()
    rows.to_parquet(str(tmp_path / "[v2]" / "x[1].parquet"))
    rows.save_to_disk(str(tmp_path / "saved"))
    DatasetDict({"test": rows}).save_to_disk(str(tmp_path / "splits"))
    (arrow,) = (tmp_path / "saved").glob("*.arrow")
    for source in (
        tmp_path / "[v2]" / "x[1].parquet",
        tmp_path / "[v2]",
        tmp_path / "saved",
        arrow,
    ):
        assert load_rows(str(source))["text"][:] == ["a", "b"]
    assert len(load_rows(str(tmp_path / "splits"), "test")) == 2
    with pytest.raises(InputError, match="no split 'train', only test"):
        load_rows(str(tmp_path / "splits"))


def test_values_are_the_files(write):
    """Not dates, numbers, nulls, or each other's keys; also where the type changes far into a
    file, after which `datasets` 5.2 returns texts with quotes around them."""
    dates = [{"text": "2020-01-01"}, {"text": "2020-01-02"}]
    assert load_rows(write("dates.jsonl", "\n".join(map(json.dumps, dates)))).to_list() == dates
    rows = load_rows(write("a.csv", "prompt,completion\n007,NA\n2020-01-01,True\n1.50,\n"))
    assert rows["prompt"][:] == ["007", "2020-01-01", "1.50"]
    assert rows["completion"][:] == ["NA", "True", None]
    long = json.dumps({"text": "a" * 1000, "calls": [{"city": "Rome"}]}) + "\n"
    mixed = [{"text": 5, "calls": [{"zone": 1}]}, {"text": "true"}, {"text": "b", "new": [None]}]
    rows = load_rows(write("mixed.jsonl", long * 11000 + "\n".join(map(json.dumps, mixed))))
    assert rows[10999] == json.loads(long) | {"new": None}
    empty = {"text": None, "calls": None, "new": None}
    assert rows[11000:]["text"] == [5, "true", "b"]
    assert [rows[11000 + i] for i in range(3)] == [empty | row for row in mixed]


def test_text_files_are_one_document_each(write, tmp_path):
    write("texts/1.txt", "one\ntwo\n")
    write("texts/2.txt", "three\r\n")
    assert load_rows(str(tmp_path / "texts"))["text"][:] == ["one\ntwo\n", "three\r\n"]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", LINE * 70000 + '{"text": \n' + LINE, r"a\.jsonl, line 70001: not JSON"),
        ("a.jsonl", '{"text"\n', r"line 1: not JSON"),
        ("a.jsonl", LINE + '"a"\n', r"line 2: expected an object with columns, got 'a'"),
        ("a.json", '[{"text": "a"},\n{"text": }]', r"line 2: not JSON"),
        ("a.jsonl", LINE.encode() + b'{"text": "\xff"}\n', r"line 2: byte 0xff is no UTF-8"),
        ("a.jsonl", LINE.encode("utf-16"), r"UTF-16"),
        ("a.jsonl", LINE + '{"text": "\\ud83d"}\n', r"line 2: '\\ud83d' is half of a character"),
        ("a.csv", "a,b\n1,2\n1,2,3\n", r"line 3: 3 fields under 2 columns"),
        ("a.csv", 'a,b\n1,2\n"1,2\n3,4\n', r"line 3: a quote that is not closed"),
        ("a.csv", "a,a\n1,2\n", r"the column a twice"),
        ("a.jsonl.gz", gzip.compress(LINE.encode() * 999)[:-9], r"a\.jsonl\.gz cannot be read: .+"),
        ("a.jsonl", "", r"a\.jsonl: no rows"),
        ("a.json", "[]", r"a\.json: no rows"),
        ("a.csv", "text\n", r"a\.csv: no rows"),
        ("a.txt", "\n", r"a\.txt: no rows"),
        ("a.parquet", "", r"a\.parquet is empty"),
        ("a.parquet", "no", r"a\.parquet cannot be opened: \w+"),
        ("a.jsonl", '{"text": ' + "[" * 100_000, r"line 1: not JSON: nested too deep"),
        ("a.pdf", "x", r"not a file of a known kind \(\.jsonl, "),
    ],
)
def test_broken_files_are_named(name, content, words, write):
    with pytest.raises(InputError, match=words) as caught:
        load_rows(write(name, content))
    assert "\n" not in str(caught.value)


def test_what_is_not_there(tmp_path):
    for source in (tmp_path / "x", tmp_path / "x.jsonl", "x.jsonl", "./x"):
        with pytest.raises(InputError, match="no such file or folder"):
            load_rows(str(source))
    (tmp_path / "README.md").write_text("# nothing else")
    with pytest.raises(InputError, match="no data in this folder"):
        load_rows(str(tmp_path))


def test_splits_of_a_folder(write, tmp_path):
    """By the names of files, then of folders; what is no data is none."""
    for name, n in (("train.jsonl", 4), ("my-test.jsonl", 2), (".hidden.jsonl", 1)):
        write(f"files/{name}", LINE * n)
    for name in ("README.md", "LICENSE", "notes.txt", "dataset_infos.json", ".git/a.jsonl"):
        write(f"files/{name}", "x")
    write("folders/train/a.jsonl", LINE * 3)
    write("folders/validation/a.jsonl", LINE)
    write("all/a.jsonl", LINE * 3)
    write("all/b.jsonl.gz", gzip.compress(LINE.encode()))
    write("shards/data/sft-00000-of-00002.jsonl", LINE)
    write("shards/data/sft-00001-of-00002.jsonl", LINE)
    found = {
        (folder, split): len(load_rows(str(tmp_path / folder), split))
        for folder, split in [
            ("files", "train"), ("files", "test"), ("folders", "train"),
            ("folders", "validation"), ("all", "train"), ("shards", "sft"),
        ]
    }  # fmt: skip
    assert list(found.values()) == [4, 2, 3, 1, 4, 2], found
    for folder, there in (("files", "train, test"), ("all", "train"), ("shards", "sft")):
        with pytest.raises(InputError, match=f"no split 'dev', only {there}$"):
            load_rows(str(tmp_path / folder), "dev")
    write("all/c.csv", "text\na\n")
    with pytest.raises(InputError, match=r"files of several kinds \(csv, json\)"):
        load_rows(str(tmp_path / "all"))


def test_configurations_of_a_cloned_data_set(write, tmp_path):
    write("x/one/q.jsonl", LINE)
    write("x/two/q.jsonl", LINE * 2)
    card = "configs:\n- config_name: a\n  data_files: one/*.jsonl\n- config_name: b\n"
    card += "  data_files:\n  - split: train\n    path: two/*\n"
    write("x/README.md", f"---\n{card}---\n# x")
    assert [len(load_rows(str(tmp_path / "x"), name=name)) for name in "ab"] == [1, 2]
    with pytest.raises(InputError, match="several configurations: a, b"):
        load_rows(str(tmp_path / "x"))


def test_a_file_that_changed_is_read_again(write):
    assert len(load_rows(write("a.jsonl", LINE))) == 1
    assert len(load_rows(write("a.jsonl", LINE * 2))) == 2
