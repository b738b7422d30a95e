"""`softlabels report` at the command line: what it prints, its exit codes, and what it says to wrong input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from softlabels.cli import main
from tests.report.test_report import make
from tests.runs import by_words


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr."""
    with pytest.raises(SystemExit) as left:
        main(list(arguments))
    said = capsys.readouterr()
    assert isinstance(left.value.code, int) and "Traceback" not in said.err
    return left.value.code, said.out, said.err


def test_a_page_and_what_is_said_of_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make(tmp_path, "one", 2.0)
    by_words(tmp_path / "bare", {"the": [0.0, 1.0, 0.0]})
    out = tmp_path / "deep" / "r.html"
    code, said, told = call(capsys, "report", str(tmp_path), "--out", str(out))
    assert code == 0 and f"ship {run}: accuracy" in said and "1 students of 1 runs" in said
    assert f"not shown: {tmp_path / 'bare'}: not evaluated" in told and out.read_text().startswith("<!doctype html>")
    code, said, _ = call(capsys, "report", str(run), "--out", str(out), "--json", "--title", "Mine & yours")
    found = json.loads(said)
    assert (code, found["ship"], found["runs"], found["bytes"]) == (0, str(run), 1, out.stat().st_size)
    assert "<title>Mine &amp; yours</title>" in out.read_text()


def test_wrong_input(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    for arguments, message in (
        (["report"], "Missing argument"),
        (["report", str(tmp_path / "missing")], "there is no folder"),
        (["report", "empty"], "holds no finished run"),
        (["report", str(make(tmp_path, "one", 2.0)), "--corpus", "x"], "--corpus x names none"),
        (["report", str(tmp_path), "--out", str(tmp_path)], "is a folder: name a file"),
    ):
        code, said, told = call(capsys, *arguments)
        assert (code, said) == (2, "") and message in told, arguments
    assert not (tmp_path / "report.html").exists()
