"""The README runs as written, its links lead somewhere, and the version is the same in every file that states it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import pyro_sparse

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_python_blocks_run_in_order(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.set_default_dtype(torch.float32)  # what a user's session starts with
    blocks = re.findall(r"^```python\n(.*?)^```$", README, flags=re.DOTALL | re.MULTILINE)
    assert len(blocks) == README.count("```python") >= 2
    namespace: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), namespace)
    assert "SupportStats(" in capsys.readouterr().out
    assert namespace["images"].shape == (4, 256, 1, 16, 16)
    assert namespace["states"].shape == (4, 256, 11, 7)


def test_links_into_the_tree_exist() -> None:
    links = re.findall(r"\]\((?!https?://)([^)#]+)\)", README)
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, flags=re.MULTILINE))
    text = README + (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    named = set(re.findall(r"(?:`|^)make ([a-z-]+)", text, flags=re.MULTILINE))
    assert {"demo", "test"} <= named <= targets


@pytest.mark.parametrize(("file", "pattern"), [("CITATION.cff", r"^version: (\S+)$"), ("CHANGELOG.md", r"^## (\S+)$")])
def test_version_is_the_packages(file: str, pattern: str) -> None:
    stated = re.search(pattern, (ROOT / file).read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert stated is not None and stated[1] == pyro_sparse.__version__


def test_oldest_versions_are_the_lower_bounds() -> None:
    bounds = re.findall(
        r"^    (torch|pyro-ppl)>=(\S+)$", (ROOT / "setup.cfg").read_text(encoding="utf-8"), re.MULTILINE
    )
    oldest = (ROOT / "constraints-oldest.txt").read_text(encoding="utf-8").splitlines()
    pinned = dict(line.split("==") for line in oldest if not line.startswith("#"))
    assert [name for name, _ in bounds] == ["torch", "pyro-ppl"]
    assert all(pinned[name] in (bound, f"{bound}.0") for name, bound in bounds)
