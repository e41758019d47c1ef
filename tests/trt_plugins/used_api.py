"""Prints what our sources use of TensorRT's Python interface and the installed module named as argument lacks.

Run by test_used_api.py, in a process of its own: the module may be real bindings over libraries without contents.
"""

from __future__ import annotations

import ast
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

import optframe_trt

OWNERS = {
    "builder": "Builder",
    "config": "IBuilderConfig",
    "network": "INetworkDefinition",
    "tensor": "ITensor",
    "layer": "ILayer",
    "parser": "OnnxParser",
    "error": "ParserError",
    "profile": "IOptimizationProfile",
    "_engine": "ICudaEngine",
    "context": "IExecutionContext",
    "_context": "IExecutionContext",
    "runtime": "Runtime",
    "runtime_config": "IRuntimeConfig",
    "inspector": "EngineInspector",
}
"""What variables of these names are in the sources below."""

SOURCES = ("builder.py", "preflight.py", "runner.py")

RTX_ONLY = {
    "IBuilderConfig.num_compute_capabilities",
    "IBuilderConfig.set_compute_capability",
    "ComputeCapability",
    "IRuntimeConfig.create_runtime_cache",
    "IRuntimeConfig.set_runtime_cache",
}
"""What is used only where the table of flavours says that the flavour has it."""


def used(tree: ast.AST) -> Iterator[str]:
    """Yield "Owner.member" for each member of a TensorRT object, "Name.Name" for what the module itself is asked."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            path = dotted(node)
            owner = OWNERS.get(path[-2]) if len(path) > 1 else None
            if owner:
                yield f"{owner}.{path[-1]}"
            if "module" in path:
                yield ".".join(path[path.index("module") + 1 :])


def dotted(node: ast.expr) -> list[str]:
    """Return the names of a dotted expression, calls and the like left out."""
    if isinstance(node, ast.Attribute):
        return [*dotted(node.value), node.attr]
    return [node.id] if isinstance(node, ast.Name) else []


def lacking(module: object, path: str) -> bool:
    for name in path.split("."):
        if not hasattr(module, name):
            return True
        module = getattr(module, name)
    return False


def main() -> None:
    module = importlib.import_module(sys.argv[1])
    folder = Path(optframe_trt.__file__).parent
    names = {name for source in SOURCES for name in used(ast.parse((folder / source).read_text())) if name}
    expected = names if module.__name__ == "tensorrt_rtx" else names - RTX_ONLY
    print(len(names), *sorted(name for name in expected if lacking(module, name)))


if __name__ == "__main__":
    main()
