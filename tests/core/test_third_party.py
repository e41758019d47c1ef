"""A stranger's package, installed with pip: found, run through the public machinery, and gone after uninstalling."""

from __future__ import annotations

import json
import os
import shutil
import site
import subprocess
import venv
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

PROJECT = Path(__file__).parents[1] / "third_party"
DISTRIBUTION = "optframe-thirdparty-example"


@dataclass(frozen=True)
class Environment:
    """A virtual environment of its own that sees the packages of this one."""

    folder: Path

    @property
    def python(self) -> str:
        return str(self.folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python"))

    def run(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        done = subprocess.run([self.python, *arguments], capture_output=True, text=True, cwd=self.folder)
        assert done.returncode == 0 or not check, done.stdout + done.stderr
        return done

    def optframe(self, *arguments: str) -> str:
        return self.run("-m", "optframe", *arguments).stdout

    def pip(self, *arguments: str) -> None:
        """Run pip; nothing is fetched."""
        self.run("-m", "pip", "--disable-pip-version-check", "--quiet", *arguments)


@pytest.fixture
def environment(tmp_path: Path) -> Environment:
    folder = tmp_path / "venv"
    venv.create(folder, symlinks=os.name != "nt")
    environment = Environment(folder)
    [purelib] = environment.run("-c", "import sysconfig; print(sysconfig.get_path('purelib'))").stdout.split()
    lines = [f"import site; site.addsitedir({path!r})" for path in site.getsitepackages()]
    (Path(purelib) / "packages_of_the_test_run.pth").write_text("\n".join(lines) + "\n")
    return environment


def plugins(environment: Environment) -> dict[str, Any]:
    return {plugin["plugin"]: plugin for plugin in json.loads(environment.optframe("plugins", "--json"))["plugins"]}


def test_a_third_party_package_from_installation_to_its_end(environment: Environment, tmp_path: Path) -> None:
    assert "thirdparty" not in plugins(environment)
    project = shutil.copytree(PROJECT, tmp_path / "project", ignore=shutil.ignore_patterns("__pycache__"))
    environment.pip("install", "--no-deps", "--no-build-isolation", "--no-index", str(project))

    assert plugins(environment)["thirdparty"] == {
        **{"plugin": "thirdparty", "distribution": DISTRIBUTION, "version": "0.3.1", "state": "loaded"},
        "contributions": {
            "model": ["swishnet"],
            "pass": ["fuse-swish"],
            "op": ["example.thirdparty::Swish"],
            "command": ["count-swish"],
        },
    }
    assert "sigmoid" in environment.optframe("passes", "fuse-swish")

    out = tmp_path / "out"
    environment.optframe("run", "swishnet", "--precision", "fp32", "--no-cache", "--out", str(out))
    report = json.loads((out / "report.json").read_text())
    [record], [run] = report["passes"], report["runs"]
    assert (record["name"], record["modified"], record["verified"]) == ("fuse-swish", True, True)
    assert run["outputs"]["scores"]["max_abs"] < 1e-4  # against FP64, in scores of order 1 to 10
    assert environment.optframe("count-swish", str(out / "optimized.onnx")) == "1\n"

    environment.run("-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(project), str(project / "tests"))

    environment.pip("uninstall", "--yes", DISTRIBUTION)
    assert "thirdparty" not in plugins(environment)
    gone = environment.run("-m", "optframe", "passes", "fuse-swish", check=False)
    assert gone.returncode == 2
    assert gone.stderr.startswith("error: unknown pass or pipeline 'fuse-swish'")
