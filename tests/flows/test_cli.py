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
        (["measure", "nosuch"], "there is no series 'nosuch' (give one of backcopy, "),
        (["measure", "pythia-70n"], "there is no series 'pythia-70n'; did you mean 'pythia-70m'?"),
        (["measure", "FILE", "--root", "FILE"], "is a file: give a folder"),
        (["list", "tables", "--root", "FILE"], "is a file: give a folder"),
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


def test_a_study_of_nothing_measurable_says_why(tmp_path: Path, cli: Cli) -> None:
    folder = tmp_path / "mine" / "step5"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    done = cli("study", f"dir:{folder.parent}", "--root", str(tmp_path / "root"))
    assert done.returncode == 1
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith(
        "ontogeny: no checkpoint of 'mine' could be measured, so there is nothing to study"
    )
    assert "run-0/step5: " in line
    assert "weights" in line


def test_unknown_option_is_exit_code_2() -> None:
    assert CliRunner().invoke(app, ["measure", "specimen", "--stepz", "1"]).exit_code == 2


def test_lists() -> None:
    for what, expected in (("analyzers", "spectra"), ("metrics", "rankme_cov"), ("series", "specimen")):
        result = CliRunner().invoke(app, ["list", what])
        assert result.exit_code == 0
        assert expected in result.stdout


def test_names_of_metrics_are_never_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flows.cli.out.width", 80)
    listed = CliRunner().invoke(app, ["list", "metrics"]).stdout
    assert "attention_previous_token" in listed


def test_an_empty_store_says_so(tmp_path: Path) -> None:
    listed = CliRunner().invoke(app, ["list", "tables", "--root", str(tmp_path)])
    assert "There is no series in the store" in listed.stdout
