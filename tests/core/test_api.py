"""The package's public names are the API, whatever has been imported before."""

import importlib
import inspect
import pkgutil
import subprocess
import sys

import optframe
from optframe import api


def test_the_package_offers_the_api_and_no_module_hides_it() -> None:
    for module in pkgutil.iter_modules(optframe.__path__):
        if module.name not in ("__main__",):
            importlib.import_module(f"optframe.{module.name}")
    functions = [name for name in optframe.__all__ if name != "__version__"]
    assert {name: getattr(optframe, name) for name in functions} == {name: getattr(api, name) for name in functions}


def test_every_public_function_is_documented() -> None:
    for name in optframe.__all__:
        if inspect.isfunction(getattr(optframe, name)):
            assert inspect.getdoc(getattr(optframe, name)), name


def test_importing_the_package_imports_nothing_heavy() -> None:
    script = "import optframe, sys; print(sorted({'onnx', 'torch', 'numpy', 'onnxruntime'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout == "[]\n"
