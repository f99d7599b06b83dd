"""The output folder: only what this run wrote is ever deleted or replaced."""

import shutil

import pytest

from fastkd.training.errors import InputError
from fastkd.training.outputs import PARTIAL, RECORD, Folder, is_complete


def put(path, text="months of work"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def make_model(files):
    return lambda folder: [put(folder / name, "a model") for name in files]


def save(folder, step, limit=None, best=None):
    put(folder.partial / f"checkpoint-{step}" / "model.safetensors", f"weights of {step}")
    put(folder.partial / f"checkpoint-{step}" / "trainer_state.json", "{}")
    folder.keep(step, {"settings": {}, "data": ""}, limit, best)


def names(path):
    return sorted(p.name for p in path.iterdir())


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def finished(out, *steps, files=("config.json", "model.safetensors"), **options):
    folder = Folder(out, **options)
    folder.begin()
    for step in steps:
        save(folder, step)
    folder.text("log.jsonl", "{}\n")
    folder.fill(make_model(files))
    folder.finish()
    return folder


def test_a_new_folder_holds_a_model_its_checkpoints_and_nothing_half_written(out):
    finished(out, 2, 4)
    expected = ["checkpoint-2", "checkpoint-4", "config.json", RECORD, "log.jsonl"]
    assert names(out) == [*expected, "model.safetensors"]


@pytest.mark.parametrize("name", ["my_lora.safetensors", "notes/today.txt", ".git/HEAD"])
def test_what_others_wrote_stays(out, name):
    theirs = put(out / name)
    with pytest.raises(InputError, match="is not empty .*--overwrite"):
        Folder(out)
    finished(out, 2, overwrite=True)
    finished(out, 3, overwrite=True)  # nor by the run after that
    assert theirs.read_text() == "months of work"
    assert "checkpoint-3" in names(out) and "checkpoint-2" not in names(out)


@pytest.mark.parametrize(
    "name",
    ["config.json", "model.safetensors", "model-00001-of-00002.safetensors",
     "adapter_config.json", "checkpoint-9/model.safetensors", "tokenizer.json"],
)  # fmt: skip
def test_what_others_wrote_is_not_replaced_either(out, name):
    """Or would make another thing of the model beside it."""
    theirs = put(out / name)
    with pytest.raises(InputError, match="did not write"):
        Folder(out, overwrite=True)
    assert theirs.read_text() == "months of work"


def test_an_earlier_run_is_replaced_as_a_whole(out):
    """An adapter's files would make the model beside them one."""
    finished(out, 2, 4, files=("adapter_config.json", "adapter_model.safetensors"))
    with pytest.raises(InputError, match="holds an earlier run: --resume goes on"):
        Folder(out)
    finished(out, 1, overwrite=True)
    assert "adapter_config.json" not in names(out)
    assert [n for n in names(out) if n.startswith("checkpoint")] == ["checkpoint-1"]


def test_an_empty_folder_is_empty(out):
    (out / "checkpoint-2-best").mkdir(parents=True)
    folder = finished(out, 2, 4)
    save(folder, 6, limit=1)
    assert "checkpoint-2-best" in names(out) and "checkpoint-6" in names(out)
    assert "checkpoint-4" not in names(out)


def test_copies_of_checkpoints_are_left_alone(out):
    folder = finished(out, 2)
    for copy in ("checkpoint-2-best", "checkpoint-50", "best"):
        shutil.copytree(out / "checkpoint-2", out / copy)
    save(folder, 4, limit=1)
    assert {"checkpoint-2-best", "checkpoint-50", "best", "checkpoint-4"} <= set(names(out))
    assert "checkpoint-2" not in names(out)
    assert Folder(out, resume=True).newest().name == "checkpoint-4"


def test_what_others_put_into_a_checkpoint_stays(out):
    folder = finished(out, 2)
    theirs = put(out / "checkpoint-2" / "notes.txt")
    save(folder, 4, limit=1)
    assert names(out / "checkpoint-2") == [theirs.name]


def test_a_run_that_goes_on_before_its_newest_checkpoint_drops_those_after(out):
    finished(out, 2, 4, 6)
    Folder(out, resume=True).begin(step=4)
    assert [n for n in names(out) if n[0] == "c"] == ["checkpoint-2", "checkpoint-4", "config.json"]


def test_limits_keep_the_newest_and_the_best(out):
    folder = Folder(out)
    folder.begin()
    for step in (2, 4, 6, 8):
        save(folder, step, limit=2, best=str(out / "checkpoint-2"))
    assert [n for n in names(out) if n[0] == "c"] == ["checkpoint-2", "checkpoint-8"]
    save(folder, 10, limit=1, best=str(out / "checkpoint-10"))
    assert [n for n in names(out) if n[0] == "c"] == ["checkpoint-10"]


def test_the_newest_complete_checkpoint_of_this_run_counts(out):
    folder = finished(out, 2, 4, 6)
    assert Folder(out, resume=True).newest().name == "checkpoint-6"
    weights = out / "checkpoint-6" / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(bytes(len(whole)))  # of the right size, but zeros: the machine died
    assert Folder(out, resume=True).newest().name == "checkpoint-4"
    weights.write_text("torn")
    assert Folder(out, resume=True).newest().name == "checkpoint-4"
    (out / "checkpoint-4" / "trainer_state.json").unlink()
    assert Folder(out, resume=True).newest().name == "checkpoint-2"
    (out / "checkpoint-2" / RECORD).write_text('{"run": "an')
    assert Folder(out, resume=True).newest() is None
    assert Folder(out, resume=True).run == folder.run


def test_checkpoints_of_an_earlier_run_never_count(out, tmp_path, capsys):
    finished(out, 2, 40)
    shutil.copytree(out / "checkpoint-40", tmp_path / "kept")
    folder = finished(out, 2, overwrite=True)
    shutil.copytree(tmp_path / "kept", out / "checkpoint-40")  # put back by hand
    assert Folder(out, resume=True).newest().name == "checkpoint-2"
    save(folder, 40)
    assert "checkpoint 40 was not saved" in capsys.readouterr().out
    assert is_complete(out / PARTIAL / "checkpoint-40")  # not lost


def test_a_killed_run_leaves_nothing_that_stops_the_next(out):
    folder = Folder(out)
    folder.begin()
    put(folder.partial / "checkpoint-2" / "model.safetensors", "half")
    folder.own("log.jsonl").write_text('{"step": 5, "lo')
    again = Folder(out, resume=True)
    assert again.goes_on and again.newest() is None
    again.begin()
    assert not folder.partial.exists()
    Folder(out, overwrite=True).begin()
    assert names(out) == [RECORD]


def test_a_torn_record_does_not_stop_a_run_with_checkpoints(out):
    folder = finished(out, 2, 4)
    put(out / RECORD, "")
    again = Folder(out, resume=True)
    assert again.run == folder.run and again.newest().name == "checkpoint-4"
    again.begin(step=4)
    assert {"log.jsonl", "model.safetensors"} <= set(again.record["files"])


def test_a_torn_record_is_no_record(out):
    put(out / RECORD, '{"run": ')
    with pytest.raises(InputError, match="is not empty"):
        Folder(out)


def test_places_that_cannot_be(tmp_path):
    file = put(tmp_path / "file")
    with pytest.raises(InputError, match="is a file"):
        Folder(file)
    with pytest.raises(InputError, match="is a file"):
        Folder(file / "below")
