"""experiments.train: what the command line says and how it ends. What a run does is in test_cells.py and others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from experiments import cells, train
from experiments.launch import RankFailure
from tests.tiny import ONE_RANK, run_ranks_here, tiny


def test_a_model_that_is_too_large_is_refused_with_its_estimate(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cells, "available_bytes", lambda cluster: 16 * 2**30)
    monkeypatch.setattr(cells, "run_ranks", lambda *_arguments, **_more: pytest.fail("it was started"))
    arguments = [f"data.path={text}", f"output_dir={tmp_path / 'out'}", "model=mixtral_8x7b", "cluster=local_2x2"]
    monkeypatch.setattr("sys.argv", ["train", *arguments])
    with pytest.raises(SystemExit) as stop:
        train.main()
    printed = capsys.readouterr()
    assert stop.value.code == 2
    assert "model mixtral_8x7b: 46.70 billion parameters" in printed.out
    assert "model=mixtral_8x7b: under system flat needs about " in printed.err
    assert "and a rank has 16.00 GiB. Fix: choose a smaller model" in printed.err
    assert not (tmp_path / "out").exists()


def test_it_says_where_the_results_are(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cells, "run_ranks", run_ranks_here)
    monkeypatch.setattr("sys.argv", ["train", *tiny(tmp_path, text, ONE_RANK, "trainer.progress=lines")])
    train.main()
    lines = capsys.readouterr().out.splitlines()
    (folder,) = tmp_path.glob("flat-tiny-s0-*")
    assert lines[0].startswith("model tiny: ")
    assert [line.split(",")[0] for line in lines[2:-1]] == [f"flat seed 0: step {step}/6" for step in range(1, 7)]
    assert lines[-1] == f"results: {folder}"


def test_it_fails_with_the_run(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_arguments: Any, **_more: Any) -> None:
        raise RankFailure("oom", 3, "the kernel took it", Path("rank3.log"))

    monkeypatch.setattr(cells, "run_ranks", fail)
    monkeypatch.setattr("sys.argv", ["train", *tiny(tmp_path, text, ONE_RANK)])
    with pytest.raises(SystemExit) as stop:
        train.main()
    assert stop.value.code == 1
    assert capsys.readouterr().err == "rank 3 ran out of memory: the kernel took it (log: rank3.log)\n"
