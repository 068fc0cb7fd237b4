"""Commands that are pointed at the wrong place say so, and write nothing there."""

import sys
from pathlib import Path

import pytest
from tiny_sets import CLS, make_manifest, make_spec_of, named, prepare, write_missing

from cli.main import featstore


def run(capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["featstore", *words])
        with pytest.raises(SystemExit) as stop:
            featstore()
    printed = capsys.readouterr()
    assert (stop.value.code or 0) == code, printed
    return printed.out + printed.err


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = prepare(tmp_path / "store", make_spec_of(), make_manifest(named(20)), [CLS])
    write_missing(folder, 1, block_rows=16)
    return tmp_path / "store"


@pytest.mark.parametrize("command", [["verify"], ["du"], ["gc"]])
def test_no_store_is_no_success(tmp_path: Path, capsys: pytest.CaptureFixture[str], command: list[str]) -> None:
    said = run(capsys, *command, "--store", str(tmp_path / "absent"), code=2)
    assert "there is no store at" in said
    assert not (tmp_path / "absent").exists()


def test_merge_from_nowhere(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = run(capsys, "merge", str(tmp_path / "absent"), "--store", str(tmp_path / "target"), code=2)
    assert "there is no store at" in said
    assert not (tmp_path / "target").exists()


def test_export_to_a_bucket(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    said = run(capsys, "export", "demo/tiny", "s3://bucket/x.npz", "--store", str(root), "--features", "cls", code=2)
    assert "export writes to local disks" in said
    assert not (tmp_path / "s3:").exists()


def test_sets_that_an_older_manifest_has(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """After registering again the rows are still there, under the manifest that they were computed for."""
    from featstore.datasets import manifest as manifests

    manifests.save(root / "datasets", make_manifest(named(24)))
    said = run(capsys, "info", "demo/tiny", "--store", str(root), code=2)
    assert "not extracted for manifest" in said
    assert "read it for an older one (--manifest)" in said
    older = make_manifest(named(20)).short
    run(capsys, "info", "demo/tiny", "--manifest", older, "--store", str(root))
    out = str(tmp_path / "x.npz")
    run(capsys, "export", "demo/tiny", out, "--features", "cls", "--manifest", older, "--store", str(root))
    run(capsys, "diff", "demo/tiny", "--other", str(root), "--manifest", older, "--store", str(root))
