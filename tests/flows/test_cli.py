"""Bad input: one sentence with the offending value on stderr, exit code 2, no traceback."""

from pathlib import Path

import pytest
from flow_support import Cli
from typer.testing import CliRunner

from flows.cli import app, main


def call(
    arguments: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> tuple[int, str]:
    monkeypatch.setattr("sys.argv", ["ontogeny", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    code = stopped.value.code
    return code if isinstance(code, int) else 0, capsys.readouterr().err


@pytest.fixture
def series_file(tmp_path: Path) -> Path:
    file = tmp_path / "mine.toml"
    file.write_text('name = "mine"\n[source]\nkind = "dir"\npath = "somewhere"\n')
    return file


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["measure", "nosuch"], "there is no series 'nosuch'"),
        (["measure", "none.toml"], "series file 'none.toml' does not exist"),
        (["measure", "hub:onlyname"], "'onlyname' is not a repository OWNER/NAME"),
        (
            ["measure", "FILE", "--analyzer", "spektra"],
            "there is no analyzer 'spektra'; did you mean 'spectra'?",
        ),
        (["measure", "FILE", "--steps", "4..2"], "'4..2' selects nothing"),
        (["measure", "FILE", "--steps", "many"], "'many' is not N, A..B or A..B:STRIDE"),
        (["measure", "FILE", "--set", "measure.batsch=8"], "unknown setting 'measure.batsch' (value 8)"),
        (
            ["measure", "FILE", "--set", "measure.batch=0"],
            "measure.batch: Input should be greater than 0 (value 0)",
        ),
        (["measure", "FILE", "--set", "measure.dtype=int8"], "(value 'int8')"),
        (["measure", "FILE", "--set", "measure.device=tpu"], "device 'tpu' is not"),
        (["measure", "FILE", "--set", "measure.parameters.spectra.tokens=some"], "'some'"),
        (["measure", "FILE", "--set", "oops"], "override 'oops' is not section.key=value"),
        (["list", "things"], "cannot list 'things'"),
        (["specimen", "--out", "x", "--width", "100"], "width 100 over 4 heads"),
    ],
)
def test_one_sentence_and_exit_code_2(
    arguments: list[str],
    sentence: str,
    series_file: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    arguments = [str(series_file) if a == "FILE" else a for a in arguments]
    code, error = call(arguments, capsys, monkeypatch)
    assert code == 2
    assert sentence in error
    assert len(error.strip().splitlines()) == 1


def test_broken_toml_names_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bad.toml").write_text("name = \n")
    code, error = call(["measure", str(tmp_path / "bad.toml")], capsys, monkeypatch)
    assert code == 2
    assert "bad.toml is not TOML" in error


def test_missing_folder(cli: Cli) -> None:
    done = cli("measure", "dir:/no/such/folder")
    assert done.returncode == 2
    assert done.stderr.strip() == "ontogeny: folder '/no/such/folder' of series 'folder' does not exist"


def test_unknown_option_is_exit_code_2() -> None:
    assert CliRunner().invoke(app, ["measure", "specimen", "--stepz", "1"]).exit_code == 2


def test_lists() -> None:
    for what, expected in (("analyzers", "spectra"), ("metrics", "rankme_cov"), ("series", "specimen")):
        result = CliRunner().invoke(app, ["list", what])
        assert result.exit_code == 0
        assert expected in result.stdout
