"""What plugins hand over: frozen dataclasses, declared lazily, and the protocols that their targets follow."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, TypeAlias

from optframe import breadcrumbs
from optframe.errors import PluginError

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir

API_VERSION = "1.0"
"""Version of this interface. A minor step adds optional fields and hooks; a major step may remove or rename."""

Feeds: TypeAlias = "Mapping[str, np.ndarray[Any, Any]]"
"""Input name -> array, for one inference."""

Outputs: TypeAlias = "Mapping[str, np.ndarray[Any, Any]]"
"""Output name -> array, of one inference."""

Precision: TypeAlias = Literal["fp32", "fp16", "int8"]
PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16", "int8")

Part: TypeAlias = Literal["export", "feeds", "calibration"]
"""What a model brings to a run: its graph, the real inputs that it is measured on, the inputs for INT8 calibration."""

DEFAULT_CALIBRATOR = "mse"
"""How INT8 ranges are chosen where nobody says: entropy and percentile, which cut off more, err up to twice as much on
photographs that are unlike those of calibration (`benchmarks/int8`)."""


def load_target(reference: str) -> Any:
    """Import and return what `reference` ("package.module:attribute") names.

    Raises:
        PluginError: the reference is malformed, or module or attribute cannot be imported.
    """
    module_name, colon, attribute = reference.partition(":")
    if not (module_name and colon and attribute):
        raise PluginError(f"'{reference}' is no reference of the form 'package.module:attribute'")
    try:
        return getattr(importlib.import_module(module_name), attribute)
    except Exception as error:  # a plugin's import may raise anything; the caller must learn which plugin it was
        raise PluginError(f"cannot load '{reference}': {type(error).__name__}: {error}") from error


def _call(role: str, reference: str, *arguments: Any) -> Any:
    """Call what `reference` names, which is an author's: a crash of the process inside it is told as such."""
    with breadcrumbs.running(f"{role} {reference}"):
        return load_target(reference)(*arguments)


@dataclass(frozen=True)
class ModelSpec:
    """A model that `optframe run NAME` knows. `target` names a class that follows `ModelAdapter`."""

    name: str
    target: str
    summary: str = ""


@dataclass(frozen=True)
class PassSpec:
    """A graph pass. `target` names a `GraphPass` subclass whose `name` equals `name`."""

    name: str
    target: str
    summary: str = ""


@dataclass(frozen=True)
class PipelineSpec:
    """A named pipeline: the text of passes (and of other pipelines' names) that it stands for."""

    name: str
    text: str
    summary: str = ""


@dataclass(frozen=True)
class CalibratorSpec:
    """A way to choose INT8 ranges. `target` names a class that follows `optframe.precision.Calibrator`."""

    name: str
    target: str
    summary: str = ""


@dataclass(frozen=True)
class BackendSpec:
    """Something that builds engines and runs them. `target` names a class that follows `optframe.backend.Backend`.

    `pipeline` names the pipeline that makes the graphs it runs best; a model may have one of its own in its place.
    """

    name: str
    target: str
    summary: str = ""
    pipeline: str = "portable"


@dataclass(frozen=True)
class CommandSpec:
    """A further sub-command of the command line. `target` names a function that typer can wrap, or a `typer.Typer`."""

    name: str
    target: str
    summary: str = ""


@dataclass(frozen=True)
class TensorInfo:
    """Shape and dtype ("float32", "float16", "bfloat16", "int8", "int32", "int64", "bool") of a tensor."""

    shape: tuple[int, ...]
    dtype: str


Defines = tuple[tuple[str, str], ...]
"""The macros that a kernel is compiled with: pairs of name and value, whose order counts for equality."""


@dataclass(frozen=True)
class KernelLaunch:
    """One CUDA launch. The kernel's arguments are: input pointers, int32 `extras`, output pointers.

    Float attributes, dtypes and the presence of optional inputs are baked into the source by `defines`, since an
    ahead-of-time TensorRT plugin can hand a kernel no scalars but int32. A grid with a zero means: nothing to launch.
    """

    entry: str
    defines: Defines
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared_bytes: int = 0
    extras: tuple[int, ...] = ()


class LaunchRule(Protocol):
    """Chooses the launch of an op for given tensors; raises InputError for what the kernel cannot do.

    `inputs` follow the op's declaration: None for an optional one that is absent, left out where all after it are too.
    """

    def __call__(
        self, inputs: Sequence[TensorInfo | None], outputs: Sequence[TensorInfo], attributes: Mapping[str, object]
    ) -> KernelLaunch: ...


class ReuseRule(Protocol):
    """Launches a kernel that was made for other shapes, known by its `defines`; raises InputError for what it can't do.

    The launch has these `defines`. Where the launch rule chooses them itself, both rules return the same launch. The
    kernel is one that the launch rule chose for the same dtypes, attributes and present inputs: shapes alone differ.
    """

    def __call__(
        self,
        inputs: Sequence[TensorInfo | None],
        outputs: Sequence[TensorInfo],
        attributes: Mapping[str, object],
        defines: Defines,
    ) -> KernelLaunch: ...


@dataclass(frozen=True)
class KernelSpec:
    """The CUDA source of an op ("package:relative/path.cu") and the reference of its `LaunchRule`.

    `reuse` is the reference of its `ReuseRule`, if kernels take other shapes than they are made for: a TensorRT engine
    has few kernels for all the shapes of a profile.
    """

    source: str
    launch: str
    reuse: str = ""

    def read_source(self) -> str:
        """Return the CUDA source text.

        Raises:
            PluginError: there is no such file in the package.
        """
        package, _, relative = self.source.partition(":")
        try:
            return resources.files(package).joinpath(relative).read_text(encoding="utf-8")
        except (OSError, ImportError, ValueError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise PluginError(f"cannot read the CUDA source '{self.source}': {reason}") from error

    def launch_rule(self) -> LaunchRule:
        """Return the launch rule, which is imported when it is called."""
        return partial(_call, "launch rule", self.launch)

    def reuse_rule(self) -> ReuseRule | None:
        """Return the rule that launches kernels made for other shapes, None where there is none."""
        if not self.reuse:
            return None
        return partial(_call, "reuse rule", self.reuse)


@dataclass(frozen=True)
class OpAttribute:
    """A typed attribute of an op; `default` None makes it required."""

    type: Literal["float", "int", "string", "ints", "floats"]
    default: float | int | str | tuple[int, ...] | tuple[float, ...] | None = None


@dataclass(frozen=True)
class OpParameter:
    """A formal input or output of an op with the dtypes it takes.

    `shift_invariant_axis`: an axis of this input along which adding the same to all changes no output, as of the keys
    of an attention; FP16 makes use of it.
    """

    name: str
    dtypes: tuple[str, ...] = ("float32", "float16", "bfloat16")
    optional: bool = False
    shift_invariant_axis: int | None = None


@dataclass(frozen=True)
class OpSpec:
    """A plugin op: one declaration, every runtime.

    `function` names `(opset: int, dtypes: Mapping[str, str]) -> onnx_ir.Function`: the op's meaning in standard ops,
    `dtypes` by parameter name, of the present inputs. `shape_rule` names `(inputs: Sequence[TensorInfo | None],
    attributes: Mapping[str, object]) -> tuple[TensorInfo, ...]`, with None for an absent input. An op without a kernel
    is legal but never counted as one node.
    """

    name: str
    domain: str
    inputs: tuple[OpParameter, ...]
    outputs: tuple[OpParameter, ...]
    function: str
    shape_rule: str
    attributes: Mapping[str, OpAttribute] = field(default_factory=dict)
    kernel: KernelSpec | None = None
    version: int = 1
    summary: str = ""

    @property
    def identifier(self) -> str:
        """`domain::name`, as the registry lists it."""
        return f"{self.domain}::{self.name}"

    def build_function(self, opset: int, dtypes: Mapping[str, str]) -> ir.Function:
        """Return the op's meaning as an ONNX function in standard ops of `opset`."""
        function: ir.Function = _call("function", self.function, opset, dtypes)
        return function

    def infer(self, inputs: Sequence[TensorInfo | None], attributes: Mapping[str, object]) -> tuple[TensorInfo, ...]:
        """Return shapes and dtypes of the outputs; an optional input that is absent is None or left out at the end.

        Raises:
            PluginError: the shape rule does not give one `TensorInfo` for each output. Whatever the rule raises, too.
        """
        infos: tuple[TensorInfo, ...] = _call("shape rule", self.shape_rule, inputs, attributes)
        if not isinstance(infos, tuple) or [type(info) for info in infos] != [TensorInfo] * len(self.outputs):
            wanted = f"a tuple of {len(self.outputs)} TensorInfo"
            raise PluginError(f"the shape rule of {self.identifier} gives {str(infos)[:80]}, not {wanted}")
        return infos


@dataclass(frozen=True)
class Illustration:
    """A picture for the report: PNG or JPEG bytes, a title, and one line on what it shows."""

    title: str
    image: bytes
    caption: str = ""
    mime: str = "image/png"


class ModelAdapter(Protocol):
    """What a `ModelSpec` names: constructed as `Adapter(options)`, where `options` is an instance of its `Options`.

    `Options` is a frozen dataclass; its fields are the model's command-line options. Those with a name that `optframe
    run` has a flag for (checkpoint, variant, shape, opset, exporter, mask, dynamic, images, calibration_images) get
    it, others come as `--model-option name=value`. Construction is cheap and validates; heavy imports wait.

    An adapter may also have `pipelines`, a mapping from the pipelines that backends ask for (`BackendSpec.pipeline`) to
    its own: `{"cuda": "mine-cuda"}`.
    """

    Options: ClassVar[type[Any]]
    pipeline: str
    """The pipeline text used when the user names none and `pipelines` has none for the backend."""
    source: str
    """What `reference` runs, in words for the report: "PyTorch FP32"."""

    def dependencies(self, of: Part) -> Mapping[str, object]:
        """Return what the export, the real inputs or the calibration data depend on, for the cache key.

        Plain values count as they are, a `Path` by the content of that file or folder.
        """
        ...

    def notes(self, of: Part) -> Sequence[str]:
        """Return plain sentences that the report of a run must show where the run has that part.

        Such as of the export "weights are seeded, not trained", of calibration "two photographs are not enough".
        """
        ...

    def export(self, path: Path) -> None:
        """Write the model as ONNX to `path`, and prove it equal to its source, or raise CheckFailed."""
        ...

    def feeds(self) -> Sequence[Feeds]:
        """Return at least two different real inputs that calibration has not seen; the first is the default one."""
        ...

    def random_feeds(self, seed: int) -> Feeds:
        """Return one random input; where shapes are dynamic, another `seed` gives another shape."""
        ...

    def calibration_feeds(self) -> Iterable[Feeds]:
        """Yield the inputs for INT8 calibration; raise InputError if there are none."""
        ...

    def reference(self, feeds: Feeds) -> Outputs:
        """Return the outputs of the model's source (PyTorch FP32) for `feeds`."""
        ...

    def illustrate(self, outputs: Mapping[str, Outputs]) -> Sequence[Illustration]:
        """Return pictures for the report from each run's outputs for the first of `feeds` (run label -> outputs)."""
        ...
