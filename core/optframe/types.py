"""What plugins hand over: frozen dataclasses, declared lazily, and the protocols that their targets follow."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib import resources
from numbers import Integral, Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, TypeAlias

from optframe import breadcrumbs
from optframe.errors import PLUGIN_ERRORS, OptframeError, PluginError, a_type, describe

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir

API_VERSION = "1.0"
"""Version of this interface. A minor step adds optional fields and hooks; a major step may remove or rename."""

Feeds: TypeAlias = "Mapping[str, np.ndarray[Any, Any]]"
"""Input name -> array, for one inference."""

Outputs: TypeAlias = "Mapping[str, np.ndarray[Any, Any]]"
"""Output name -> array, of one inference."""

DTYPES = frozenset(
    f"{kind}{size}"
    for kind, sizes in {
        "float": (16, 32, 64, "8e4m3fn", "8e4m3fnuz", "8e5m2", "8e5m2fnuz", "8e8m0", "4e2m1"),
        "bfloat": (16,),
        "int": (2, 4, 8, 16, 32, 64),
        "uint": (2, 4, 8, 16, 32, 64),
        "complex": (64, 128),
        "bool": ("",),
        "string": ("",),
    }.items()
    for size in sizes
)
"""Names of dtypes: NumPy's where it has the type, ONNX's in small letters otherwise."""

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
    """Call what `reference` names, which is an author's: a crash of the process inside it is told as such.

    Raises:
        PluginError: it raised what is no error for the user.
    """
    with breadcrumbs.running(f"{role} {reference}"):
        target = load_target(reference)
        try:
            return target(*arguments)
        except OptframeError:
            raise
        except PLUGIN_ERRORS as error:
            raise PluginError(f"{role} {reference} raised {describe(error)}") from error


def _launch(role: str, reference: str, *arguments: Any) -> KernelLaunch:
    """Call a rule of an author's that returns a launch, and check what it returns."""
    launch: object = _call(role, reference, *arguments)
    if not isinstance(launch, KernelLaunch):
        raise PluginError(f"{role} {reference} gives {str(launch)[:80]}, not a KernelLaunch")
    flaw = launch.flaw()
    if flaw:
        raise PluginError(f"{role} {reference} gives a launch whose {flaw}")
    return launch


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

    `overlap` lets the kernel begin while the one before it on its stream still runs, on GPUs from compute capability
    9.0 on (programmatic dependent launch). Compiled for these, each of its threads waits by `griddepcontrol.wait`
    before it reads or writes global memory and before it ends.
    """

    entry: str
    defines: Defines
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared_bytes: int = 0
    extras: tuple[int, ...] = ()
    overlap: bool = False

    def flaw(self) -> str | None:
        """Return which field is of another type than declared, and how it is wrong, or None."""
        for name in ("grid", "block"):
            value = getattr(self, name)
            if not _all_integers(value) or len(value) != 3:
                return f"{name} is {value!r}, not a tuple of three integers"
        if not _all_integers(self.extras):
            return f"extras are {self.extras!r}, not a tuple of integers"
        if not _all_integers((self.shared_bytes,)):
            return f"shared_bytes are {self.shared_bytes!r}, not an integer"
        if not isinstance(self.defines, tuple) or not all(map(_is_define, self.defines)):
            return f"defines are {self.defines!r}, not a tuple of pairs of text"
        if not isinstance(self.overlap, bool):
            return f"overlap is {self.overlap!r}, not true or false"
        return None if isinstance(self.entry, str) else f"entry is {self.entry!r}, not text"


def _all_integers(value: object) -> bool:
    return isinstance(value, tuple) and all(isinstance(number, Integral) for number in value)


def _is_define(pair: object) -> bool:
    return isinstance(pair, tuple) and len(pair) == 2 and all(isinstance(text, str) for text in pair)


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
        return partial(_launch, "launch rule", self.launch)

    def reuse_rule(self) -> ReuseRule | None:
        """Return the rule that launches kernels made for other shapes, None where there is none."""
        if not self.reuse:
            return None
        return partial(_launch, "reuse rule", self.reuse)


@dataclass(frozen=True)
class OpAttribute:
    """A typed attribute of an op; `default` None makes it required."""

    type: Literal["float", "int", "string", "ints", "floats"]
    default: float | int | str | tuple[int, ...] | tuple[float, ...] | None = None

    def flaw(self) -> str | None:
        """Return which type is unknown, or which default is of another type, or None."""
        kinds: dict[str, type] = {"float": Real, "floats": Real, "int": Integral, "ints": Integral, "string": str}
        if self.type not in kinds:
            return f"the type {self.type!r}, which is none of {', '.join(kinds)}"
        kind = kinds[self.type]
        if self.default is None:
            return None
        values: object = self.default if self.type in ("ints", "floats") else (self.default,)
        if not isinstance(values, tuple) or not all(isinstance(value, kind) for value in values):
            return f"the default {self.default!r}, which is no {self.type}"
        return None


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

    def flaw(self) -> str | None:
        """Return what is declared wrongly, or None."""
        for what, parameters in (("inputs", self.inputs), ("outputs", self.outputs)):
            if not isinstance(parameters, tuple) or not all(isinstance(p, OpParameter) for p in parameters):
                return f"{what} are no tuple of OpParameter"
            for parameter in parameters:
                if not isinstance(parameter.dtypes, tuple) or not parameter.dtypes:
                    return f"the dtypes of '{parameter.name}' are no tuple of names"
                unknown = [dtype for dtype in parameter.dtypes if dtype not in DTYPES]
                if unknown:
                    return (
                        f"'{parameter.name}' has the dtype {unknown[0]!r}, which is none of {', '.join(sorted(DTYPES))}"
                    )
        for name, attribute in self.attributes.items():
            if not isinstance(attribute, OpAttribute):
                return f"the attribute '{name}' is {a_type(attribute)}, not an OpAttribute"
            flaw = attribute.flaw()
            if flaw:
                return f"the attribute '{name}' has {flaw}"
        if self.kernel is not None and not isinstance(self.kernel, KernelSpec):
            return f"its kernel is {a_type(self.kernel)}, not a KernelSpec"
        return None

    def build_function(self, opset: int, dtypes: Mapping[str, str]) -> ir.Function:
        """Return the op's meaning as an ONNX function in standard ops of `opset`, for the dtypes of present inputs.

        Raises:
            PluginError: what its author's function gives is no `onnx_ir.Function` of this op, or it fails.
        """
        import onnx_ir as ir

        function: object = _call("function", self.function, opset, dtypes)
        if not isinstance(function, ir.Function):
            raise PluginError(f"the function of {self.identifier} is {a_type(function)}, not an onnx_ir.Function")
        if (function.domain, function.name) != (self.domain, self.name):
            raise PluginError(f"the function of {self.identifier} is called {function.domain}::{function.name}")
        for what, found, least, most in (
            ("inputs", len(function.inputs), len(dtypes), len(self.inputs)),
            ("outputs", len(function.outputs), len(self.outputs), len(self.outputs)),
        ):
            if not least <= found <= most:
                wanted = f"{least}" if least == most else f"{least} to {most}"
                raise PluginError(f"the function of {self.identifier} has {found} {what}, not {wanted}")
        return function

    def infer(self, inputs: Sequence[TensorInfo | None], attributes: Mapping[str, object]) -> tuple[TensorInfo, ...]:
        """Return shapes and dtypes of the outputs; an optional input that is absent is None or left out at the end.

        Raises:
            PluginError: the shape rule does not give one `TensorInfo` for each output, or fails.
            InputError: the rule refuses the inputs.
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
