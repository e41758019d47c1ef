"""Modules that a library imports for seldom uses load when they are looked into."""

from __future__ import annotations

import subprocess
import sys


def run(code: str) -> str:
    """Return what `code` prints in a fresh Python."""
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip()


def test_the_api_does_without_sympy() -> None:
    assert run("import optframe.api, sys; print('sympy.core' in sys.modules)") == "False"


def test_names_of_dimensions_are_computed_with() -> None:
    assert run("import optframe.api, onnx_ir as ir; print(2 * ir.SymbolicDim('a') + ir.SymbolicDim('b'))") == "2*a + b"


def test_sympy_is_itself_for_everyone_else() -> None:
    code = "import optframe, sympy.polys, sympy; from sympy import Symbol; print(sympy.expand((Symbol('x') + 1) ** 2))"
    assert run(code) == "x**2 + 2*x + 1"


def test_what_was_imported_before_stays() -> None:
    assert run("import sympy; core = sympy.core; import optframe.api, sympy; print(sympy.core is core)") == "True"


def test_threads_see_whole_modules() -> None:
    code = """
import threading, optframe.api, onnx_ir as ir
start, found = threading.Barrier(16), []
def compute():
    start.wait()
    found.append(str(ir.SymbolicDim('N') + 1))
threads = [threading.Thread(target=compute) for _ in range(16)]
for thread in threads: thread.start()
for thread in threads: thread.join()
print(len(found), set(found))
"""
    assert run(code) == "16 {'N + 1'}"
