"""Where the text comes from: which files count, what is held out, and what a user is told."""

from __future__ import annotations

import os
from pathlib import Path

import pydantic
import pytest

from experiments.corpus import DataConfig, scan_text, split_by_file, text_corpus
from moe.errors import ConfigError, Problem


def only_problem(error: pytest.ExceptionInfo[ConfigError]) -> Problem:
    [problem] = error.value.problems
    return problem


def test_standard_library_is_the_default() -> None:
    files = scan_text(DataConfig())
    assert {"argparse.py", "json/decoder.py"} <= set(files.names)
    assert all(name.endswith(".py") for name in files.names)
    folders = {part for name in files.names for part in name.split("/")[:-1]}
    assert not folders & {"test", "tests", "site-packages", "dist-packages", "__pycache__"}
    assert list(files.names) == sorted(files.names)


def test_folder_gives_its_text_files_without_hidden_empty_and_binary_ones(tmp_path: Path) -> None:
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / ".git").mkdir()
    (tmp_path / "b.txt").write_text("b")
    (tmp_path / "deep" / "er" / "a.md").write_text("ä")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "blank.txt").write_text(" \n\t")
    (tmp_path / "image.png").write_bytes(b"\x89PNG\0")
    (tmp_path / ".hidden").write_text("no")
    (tmp_path / ".git" / "config").write_text("no")
    (tmp_path / "broken_link").symlink_to(tmp_path / "nowhere")
    files = scan_text(DataConfig(path=str(tmp_path)))
    assert files.names == ("b.txt", "deep/er/a.md")
    assert files.left_out == ("image.png",)


def test_digest_follows_content_and_names_but_not_the_place(tmp_path: Path) -> None:
    def digest(folder: str, **texts: str) -> str:
        (tmp_path / folder).mkdir()
        for name, text in texts.items():
            (tmp_path / folder / name).write_text(text)
        return scan_text(DataConfig(path=str(tmp_path / folder))).digest

    first = digest("first", a="one", b="two")
    assert digest("same", b="two", a="one") == first
    assert digest("content", a="one", b="twO") != first
    assert digest("name", a="one", c="two") != first
    assert digest("border", a="onet", b="wo") != first


def test_split_by_file_is_disjoint_complete_and_about_the_asked_share() -> None:
    names = [f"folder/file_{index}.py" for index in range(2000)]
    train, val = split_by_file(names, 0.1)
    assert sorted(train + val) == sorted(names)
    assert 150 < len(val) < 250
    assert split_by_file(names, 0.1) == (train, val)


def test_a_new_file_moves_no_other() -> None:
    names = [f"{index}.txt" for index in range(200)]
    val = set(split_by_file(names, 0.2)[1])
    assert set(split_by_file([*names, "new.txt"], 0.2)[1]) - {"new.txt"} == val


@pytest.mark.parametrize("val_fraction", [1e-9, 0.4999])
@pytest.mark.parametrize("count", [2, 3, 5])
def test_both_sides_get_a_file(count: int, val_fraction: float) -> None:
    for offset in range(50):
        train, val = split_by_file([f"{offset}_{index}" for index in range(count)], val_fraction)
        assert train
        assert val


def test_files_never_cross_the_split(tmp_path: Path) -> None:
    for index in range(40):
        (tmp_path / f"{index}.txt").write_text(f"text of file {index}.\n")
    data = DataConfig(path=str(tmp_path), val_fraction=0.3)
    corpus = text_corpus(scan_text(data), data)
    train, val = list(corpus.train()), list(corpus.val())
    assert not set(train) & set(val)
    assert len(train) + len(val) == 40
    assert list(corpus.train()) == train, "a second pass must give the same documents"


def test_single_file_holds_out_its_tail_from_a_line_on(tmp_path: Path) -> None:
    text = "".join(f"line {index}\n" for index in range(100))
    (tmp_path / "book.txt").write_text(text)
    data = DataConfig(path=str(tmp_path / "book.txt"), val_fraction=0.1)
    corpus = text_corpus(scan_text(data), data)
    [train], [val] = corpus.train(), corpus.val()
    assert train + val == text
    assert val.startswith("line ")
    assert len(val) == pytest.approx(0.1 * len(text), abs=10)


def test_single_line_is_cut_where_the_share_says(tmp_path: Path) -> None:
    (tmp_path / "line.txt").write_text("x" * 100)
    data = DataConfig(path=str(tmp_path / "line.txt"), val_fraction=0.1)
    corpus = text_corpus(scan_text(data), data)
    assert [list(corpus.train()), list(corpus.val())] == [["x" * 90], ["x" * 10]]


def test_missing_path(tmp_path: Path) -> None:
    [problem] = DataConfig(path=str(tmp_path / "gone")).problems()
    assert (problem.key, problem.value) == ("data.path", str(tmp_path / "gone"))
    assert "there is no such file or folder" in problem.rule
    assert "check the spelling" in problem.fix


def test_path_that_is_neither_file_nor_folder(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    [problem] = DataConfig(path=str(tmp_path / "pipe")).problems()
    assert problem.key == "data.path"
    assert problem.rule == "must be a file or a folder"
    assert problem.fix == "name a file or a folder of text"


@pytest.mark.parametrize("texts", [{}, {"empty.txt": ""}, {"a.txt": "\n \n", "b.txt": ""}])
def test_nothing_to_read(tmp_path: Path, texts: dict[str, str]) -> None:
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError) as error:
        scan_text(DataConfig(path=str(tmp_path)))
    problem = only_problem(error)
    assert (problem.key, problem.value, problem.rule) == ("data.path", str(tmp_path), "holds no text")
    assert problem.fix == "name a file or folder with text in it"


@pytest.mark.parametrize("raw", [b"ELF\0\0", "naïve".encode("latin-1"), "text".encode("utf-16")])
def test_file_that_is_not_text(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / "file").write_bytes(raw)
    with pytest.raises(ConfigError) as error:
        scan_text(DataConfig(path=str(tmp_path / "file")))
    problem = only_problem(error)
    assert (problem.key, problem.value) == ("data.path", str(tmp_path / "file"))
    assert problem.rule == "must be UTF-8 text, but 1 of 1 files are not (first: file)"
    assert "iconv -t UTF-8" in problem.fix


def test_folder_that_is_mostly_not_text(tmp_path: Path) -> None:
    (tmp_path / "readme").write_text("text")
    for index in range(2):
        (tmp_path / f"{index}.bin").write_bytes(b"\0")
    with pytest.raises(ConfigError, match=r"but 2 of 3 files are not \(first: 0.bin\)"):
        scan_text(DataConfig(path=str(tmp_path)))


def test_file_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("text")

    def denied(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", denied)  # Root, who runs some test machines, may read everything.
    with pytest.raises(ConfigError) as error:
        scan_text(DataConfig(path=str(tmp_path)))
    problem = only_problem(error)
    assert (problem.key, problem.value) == ("data.path", str(tmp_path))
    assert problem.rule == f"must be readable, but {tmp_path / 'file'} is not (Permission denied)"
    assert "check the permissions" in problem.fix


@pytest.mark.parametrize("change", ["removed", "binary"])
def test_file_that_changes_while_it_is_read(tmp_path: Path, change: str) -> None:
    for name in ("a", "b"):
        (tmp_path / name).write_text("text")
    data = DataConfig(path=str(tmp_path))
    corpus = text_corpus(scan_text(data), data)
    for name in ("a", "b"):
        if change == "removed":
            (tmp_path / name).unlink()
        else:
            (tmp_path / name).write_bytes(b"\0")
    with pytest.raises(ConfigError) as error:
        list(corpus.train())
    problem = only_problem(error)
    assert problem.key == "data.path"
    expected = {"removed": ("must be readable", "permissions"), "binary": ("must not change", "start again")}[change]
    assert expected[0] in problem.rule
    assert expected[1] in problem.fix


def test_keys_of_the_other_source_are_told_all_at_once() -> None:
    problems = DataConfig(name="wikitext", subset="raw").problems()
    assert [(item.key, item.value) for item in problems] == [("data.name", "wikitext"), ("data.subset", "raw")]
    assert {item.rule for item in problems} == {"only source=hf reads it"}
    assert {item.fix for item in problems} == {"remove it, or choose data=hf"}
    problems = DataConfig(source="hf", path="somewhere").problems()
    assert [item.key for item in problems] == ["data.path", "data.name"]
    assert problems[0].rule == "only source=text reads it"
    assert problems[0].fix == "remove it, or choose data=text"
    assert problems[1].rule == "source=hf needs the name of a dataset"
    assert "data.name=wikitext, or data=text" in problems[1].fix


@pytest.mark.parametrize(
    "fields",
    [
        {"path": ""},
        {"val_fraction": 0},
        {"val_fraction": 0.5},
        {"val_fraction": float("nan")},
        {"source": "web"},
        {"p": 1},
    ],
)
def test_wrong_fields_are_denied(fields: dict) -> None:
    with pytest.raises(pydantic.ValidationError):
        DataConfig(**fields)
