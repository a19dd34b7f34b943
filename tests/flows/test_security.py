"""What checkpoints and configurations of others can do (docs/security.md): nothing but fail."""

import ast
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from flow_support import TINY, Cli
from prefect.settings import PREFECT_SERVER_API_HOST

from flows.config import resolve
from storage import UsageError, open_root
from storage.mirror import Mirror
from storage.tables import TABLES

REPOSITORY = Path(__file__).parents[2]
PACKAGES = ("flows", "tasks", "analyzers", "storage")


class Evil:
    """A pickle that makes a folder when it is loaded."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.target),)


def test_a_malicious_pickle_fails_and_the_next_checkpoint_follows(
    series: Path, cli: Cli, tmp_path: Path
) -> None:
    folder = series / "seed0" / "step4"
    (folder / "model.safetensors").unlink()
    torch.save({"gpt_neox.embed_in.weight": Evil(tmp_path / "ran")}, folder / "pytorch_model.bin")
    root = tmp_path / "root"
    chosen = ("--steps", "2,4", "--analyzer", "loss", "--analyzer", "weights")
    done = cli("measure", f"dir:{series}", "--root", str(root), *chosen, *TINY)
    assert done.returncode == 1
    assert not (tmp_path / "ran").exists()
    store = open_root(root)
    failures = store.table("failures").to_pandas()
    assert set(zip(failures["run"], failures["step"], strict=True)) == {("seed0", 4)}
    assert failures["error"].str.contains("(?i)weights.only").all()
    metrics = store.table("metrics").to_pandas()
    assert {("seed0", 2), ("seed1", 2), ("seed1", 4)} <= set(
        zip(metrics["run"], metrics["step"], strict=True)
    )


def test_a_token_is_in_no_table_and_no_output(
    series: Path, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = "hf_thisIsNotARealTokenAtAll"
    monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not-a-real-key-either")
    # A person may well paste it where it does not belong.
    pasted = f"probe.text={tmp_path}/{token}.jsonl"
    done = cli("audit", f"dir:{series}", "--root", str(tmp_path / "root"), "--set", pasted)
    outputs = done.stdout + done.stderr
    store = open_root(tmp_path / "root")
    held = "".join(str(store.table(name, history=True).to_pylist()) for name in TABLES)
    assert "provenance" in TABLES
    assert len(store.table("provenance")) == 1
    assert "/***.jsonl" in held
    for secret in (token, "not-a-real-key-either"):
        assert secret not in held
        assert secret not in outputs


def test_a_root_with_a_password_is_refused_and_not_repeated(cli: Cli) -> None:
    done = cli("list", "tables", "--root", "s3://somebody:pa55word@host/bucket")
    assert done.returncode == 2
    assert "holds a login" in done.stderr
    assert "pa55word" not in done.stdout + done.stderr


def _calls(tree: ast.AST) -> list[tuple[str, ast.Call]]:
    return [(ast.unparse(node.func), node) for node in ast.walk(tree) if isinstance(node, ast.Call)]


def test_only_the_loader_imports_what_a_configuration_names() -> None:
    """No other place of the packages can turn text into code, or unpickles."""
    imports, code, pickles = set(), [], []
    for package in PACKAGES:
        for path in (REPOSITORY / package).rglob("*.py"):
            place = path.relative_to(REPOSITORY).as_posix()
            for name, call in _calls(ast.parse(path.read_text(encoding="utf-8"))):
                given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
                if name in ("importlib.import_module", "import_module", "__import__"):
                    imports.add(place)
                if name in ("eval", "exec", "compile", "os.system") or given.get("shell") == "True":
                    code.append((place, name))
                if given.get("trust_remote_code", "False") != "False":
                    code.append((place, name))
                unsafe = name == "torch.load" and given.get("weights_only") != "True"
                if unsafe or "allow_pickle" in given or name.split(".")[0] in ("pickle", "joblib", "dill"):
                    pickles.append((place, name))
                if name.endswith("read_pickle"):
                    pickles.append((place, name))
    assert imports == {"tasks/loader.py"}
    assert code == []
    assert pickles == []


@pytest.mark.parametrize("name", ["../../x", "/etc", "a/b", ".hidden", "$(touch x)"])
def test_names_in_a_configuration_cannot_leave_the_root(tmp_path: Path, name: str) -> None:
    text = f"name = '{name}'\n[source]\nkind = 'hub'\n[source.repos]\nseed0 = 'owner/name'\n"
    (tmp_path / "series.toml").write_text(text)
    with pytest.raises(UsageError, match="name"):
        resolve(str(tmp_path / "series.toml"))
    text = f"name = 'fine'\n[source]\nkind = 'hub'\n[source.repos]\n'{name}' = 'owner/name'\n"
    (tmp_path / "series.toml").write_text(text)
    with pytest.raises(UsageError, match="run name"):
        resolve(str(tmp_path / "series.toml"))


@pytest.mark.parametrize("name", ["../../x", "/etc/passwd", "a/b"])
def test_a_series_of_a_command_cannot_leave_the_root(cli: Cli, tmp_path: Path, name: str) -> None:
    done = cli("report", name, "--root", str(tmp_path / "root"))
    assert done.returncode == 2
    assert list(tmp_path.iterdir()) == []


def test_servers_listen_on_this_machine_alone() -> None:
    assert PREFECT_SERVER_API_HOST.value() == "127.0.0.1"
    with Mirror({}) as mirror:
        assert mirror.server_address[0] == "127.0.0.1"
