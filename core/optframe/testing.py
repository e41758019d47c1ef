"""What third parties test their plugins with: hosts made of given plugins, and the contracts of passes and ops.

The `assert_...` functions raise AssertionError with what is wrong. They need no GPU: ops are run by their meaning in
standard ops, in onnxruntime on the CPU.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir

from optframe import graph, numerics, ops
from optframe.backends.onnxruntime import OnnxRuntimeRunner, SessionSettings, create_session
from optframe.dialect import GraphSurgeonView
from optframe.errors import InputError, PluginError
from optframe.gate.structure import foreign_domains, interface_problem, wiring_problem
from optframe.graph import ONNX_DOMAINS
from optframe.host import PluginHost
from optframe.passes import SCOPE_KEY, GraphPass, PassContext, PassResult
from optframe.pipeline import Pipeline
from optframe.provenance import node_origin
from optframe.registry import Registry
from optframe.snapshot import Snapshot
from optframe.types import Feeds, OpSpec, Outputs, PassSpec, TensorInfo, load_target

Array = np.ndarray[Any, Any]

UNIT_ROUNDOFF = {"float64": 2.0**-53, "float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}

ROUNDINGS = 32
"""How many unit roundings of its dtype an op's output may be off, relative to its largest magnitude (or 1): room for
some ten operations one after another, or a sum over a thousand elements (whose error grows with the root)."""


def host_with(*plugins: object) -> PluginHost:
    """Return a host that has only `plugins`: modules, or objects with hook implementations as methods."""
    host = PluginHost(discover=False)
    for plugin in plugins:
        host.register(plugin, plugin.__name__ if isinstance(plugin, ModuleType) else type(plugin).__name__)
    return host


def model_from_text(text: str, opset: int = 18, *, domains: Sequence[str] = (), **weights: Array) -> ir.Model:
    """Return the model of a graph in onnx's textual syntax, as "g (float[2] x, float w) => (float[2] y) { ... }".

    `weights` become initialisers, in the place of inputs of their names. It imports version 1 of each of `domains`. A
    node without a name gets its op type and number.

    Raises:
        onnx.parser.ParseError: `text` is no graph; the message says where.
    """
    imports = ", ".join([f'"" : {opset}', *(f'"{domain}" : 1' for domain in domains)])
    proto = onnx.parser.parse_model(f"<ir_version: 10, opset_import: [{imports}]>\n{text}")
    kept = [value for value in proto.graph.input if value.name not in weights]
    del proto.graph.input[:]
    proto.graph.input.extend(kept)
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in weights.items())
    for number, node in enumerate(proto.graph.node):
        node.name = node.name or f"{node.op_type}{number}"
    return ir.from_proto(proto)


def assert_plugin_contract(*plugins: object) -> Registry:
    """Check that `plugins` have no problems and that all they declare lazily loads; return their registry."""
    registry = Registry(host_with(*plugins))
    assert not registry.problems, "\n".join(map(str, registry.problems))
    for load, specs in (
        (registry.load_model, registry.models()),
        (registry.load_pass, registry.passes()),
        (registry.load_calibrator, registry.calibrators()),
        (registry.load_backend, registry.backends()),
        (registry.load_command, registry.commands()),
    ):
        for spec in specs:
            load(spec.name)
    for op in registry.ops().values():
        _load_op(op)
    return registry


def _load_op(spec: OpSpec) -> None:
    """Import what an op refers to, and read its kernel's source; it is told as the op's where that fails."""
    kernel = spec.kernel
    references = [spec.function, spec.shape_rule, *([kernel.launch, kernel.reuse] if kernel else [])]
    try:
        for reference in filter(None, references):
            load_target(reference)
        if kernel is not None:
            kernel.read_source()
    except PluginError as error:
        raise PluginError(f"op '{spec.identifier}': {error}") from error


def assert_pass_contract(
    pass_: GraphPass,
    model: ir.Model,
    feeds: Sequence[Feeds],
    *,
    ops: Iterable[OpSpec] = (),
    allowed: float | None = None,
) -> PassResult:
    """Check that a pass keeps what every pass has to keep on `model`, which stays as it is; return what the pass said.

    That is: the model still computes the same on `feeds`, has the same inputs and outputs, is wired properly and as
    valid for onnx's checker as before, and has no ops of domains that the pass does not declare; `modified` is true if
    and only if something changed; a second run changes nothing; two runs on equal models agree; no rewrite is made that
    `context.allow` refuses; and the pass with its options survives its text form.

    Args:
        feeds: inputs to run the model on before and after, at least one.
        ops: registered ops that the pass may use.
        allowed: largest relative difference of an output, see `optframe.numerics.TOLERANCES`; by default what that
            table says for the coarsest type among inputs, outputs and weights.
    """
    assert feeds, "no feeds: equality would not be tested"
    registered = {spec.identifier: spec for spec in ops}
    first = _Execution.of(pass_, model, registered)
    first.check_structure()
    _assert_equal_outputs(pass_, model, first.model, feeds, allowed)
    again = _Execution.of(pass_, first.model, registered)
    assert not again.result.modified, f"{pass_.name} finds more to do when it runs again"
    assert not again.changed, f"{pass_.name} changes the model when it runs again, and says it does not"
    twin = _Execution.of(pass_, model, registered)
    assert first.after.same(twin.after), f"{pass_.name} is not deterministic"
    refused = _Execution.of(pass_, model, registered, allow=False).result.rewrites
    assert refused == 0, f"{pass_.name} makes {refused} rewrites without asking context.allow"
    assert_provenance(pass_, model, ops=registered.values())
    _assert_text_form(pass_)
    return first.result


@dataclass(frozen=True)
class _Execution:
    """What a pass made of a copy of a model; `before` is the copy as the pass's dialect shows it."""

    pass_: GraphPass
    result: PassResult
    before: Snapshot
    model: ir.Model

    @classmethod
    def of(cls, pass_: GraphPass, model: ir.Model, ops: Mapping[str, OpSpec], allow: bool = True) -> _Execution:
        context = PassContext(ops, allow_rewrite=lambda _: allow, pass_name=pass_.name)
        if pass_.dialect == "onnx_ir":
            copy = model.clone()
            return cls(pass_, pass_.run(copy, context), Snapshot.take(model), copy)
        view = GraphSurgeonView(model)
        before = Snapshot.take(view.to_model())
        result = pass_.run(view.graph, context)
        view.stamp(pass_.name)
        return cls(pass_, result, before, view.to_model())

    @cached_property
    def after(self) -> Snapshot:
        problem = wiring_problem(self.model)
        assert problem is None, f"{self.pass_.name}: {problem}"
        return Snapshot.take(self.model)

    @property
    def changed(self) -> bool:
        return not self.before.same(self.after)

    def check_structure(self) -> None:
        """Check what must hold of the model, and that the pass told the truth."""
        said, name = self.result.modified, self.pass_.name
        assert said == self.changed, f"{name} says modified={said}, which is not true"
        domains = self.pass_.domains
        problem = interface_problem(self.before, self.after) or foreign_domains(self.before, self.after, domains)
        assert problem is None, f"{name}: {problem}"
        complaint = _checker_complaint(self.model)
        assert complaint is None or _checker_complaint(self.before.model), f"{name}: onnx's checker says: {complaint}"


def assert_provenance(pass_: GraphPass, model: ir.Model, *, ops: Iterable[OpSpec] = ()) -> int:
    """Check that each node which `pass_` makes says so, from which nodes and from which torch modules.

    Seen on a copy of `model` whose nodes all have names and modules; `assert_pass_contract` does this too. Returns how
    many nodes were new.
    """
    tagged = model.clone()
    kept = {}
    for number, node in enumerate(tagged.graph.all_nodes()):
        node.name = f"tagged{number}"
        node.metadata_props[SCOPE_KEY] = f"module{number}"
        kept[node.name] = node.op_identifier()
    changed = _Execution.of(pass_, tagged, {spec.identifier: spec for spec in ops}).model
    new = [node for node in changed.graph.all_nodes() if kept.get(node.name or "") != node.op_identifier()]
    for told in map(node_origin, new):
        what = f"{pass_.name} made {told.op_type} '{told.name}', which does not say"
        assert pass_.name in told.passes, f"{what} so"
        assert told.origins, f"{what} from which nodes"
        assert told.modules, f"{what} from which modules"
    return len(new)


def _checker_complaint(model: ir.Model) -> str | None:
    try:
        onnx.checker.check_model(ir.to_proto(model), full_check=True)
    except Exception as error:  # the checker and shape inference raise several types
        return str(error)
    return None


def _assert_equal_outputs(
    pass_: GraphPass, model: ir.Model, changed: ir.Model, feeds: Sequence[Feeds], allowed: float | None
) -> None:
    if allowed is None:
        values = [*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()]
        allowed = numerics.tolerance(value.dtype.value for value in values if value.dtype is not None)
    expected, actual = _run(model, feeds), _run(changed, feeds)
    assert expected is not None, "onnxruntime has no kernels for the types of this model, so nothing can be shown"
    assert actual is not None, f"{pass_.name} leaves ops that onnxruntime has no kernels for"
    for number, (old, new) in enumerate(zip(expected, actual, strict=True)):
        for name, array in old.items():
            verdict = numerics.compare(array, new[name], allowed)
            assert verdict.status == "equal", f"{pass_.name}: output '{name}' for input {number}: {verdict.reason}"


@dataclass(frozen=True)
class _OnlyPass:
    """A registry of one pass, for reading its text form."""

    cls: type[GraphPass]

    def step(self, name: str) -> PassSpec:
        return PassSpec(name, f"{self.cls.__module__}:{self.cls.__qualname__}")

    def load_pass(self, name: str) -> type[GraphPass]:
        return self.cls


def _assert_text_form(pass_: GraphPass) -> None:
    text = str(Pipeline((pass_,)))
    assert Pipeline.parse(text, _OnlyPass(type(pass_))).steps == (pass_,), f"{text} does not read back to {pass_}"


def assert_op_contract(
    spec: OpSpec,
    draw: Callable[[np.random.Generator], Mapping[str, Array]],
    reference: Callable[..., Array | Sequence[Array]],
    *,
    seed: int,
    attributes: Mapping[str, Any] | None = None,
    opsets: Sequence[int] = (17, 18, 20),
    trials: int = 3,
    roundings: float = ROUNDINGS,
) -> list[Mapping[str, str]]:
    """Check that an op means what `reference` computes, for every dtype that onnxruntime's CPU provider can run it in.

    That is: its ONNX function is made of standard ops, passes onnx's checker, runs and gives the reference's values;
    its shape rule foretells shapes and dtypes of what onnxruntime returns; the kernel that its launch rule chooses is
    in its source; and a reuse rule launches that one as the launch rule does.

    Args:
        draw: returns one call's inputs by parameter name, of random shapes, floats in any float dtype; an optional
            input that it leaves out is absent.
        reference: `(**inputs, **attributes) -> outputs` in NumPy; gets floats as float64, and all attributes.
        seed: of everything random; print it, so that a failure can be repeated.
        attributes: of the node; those left out have their defaults.
        opsets: versions of ONNX's opset that the function is asked for.
        trials: how many calls are drawn for each opset and dtype.
        roundings: see `ROUNDINGS`.

    Returns:
        The dtypes by parameter name that were shown to be right. onnxruntime lacks kernels for some types.
    """
    rng = np.random.default_rng(seed)
    given = {name: attribute.default for name, attribute in spec.attributes.items()} | dict(attributes or {})
    shown = []
    for dtypes in _dtype_choices(spec):
        calls = [_Call(spec, opset, _cast(spec, draw(rng), dtypes), given) for opset in opsets for _ in range(trials)]
        if all(call.holds(reference, roundings) for call in calls):
            shown.append(dtypes)
    assert shown, f"{spec.identifier}: onnxruntime has no kernels for any of its dtypes, so nothing was shown"
    return shown


def _dtype_choices(spec: OpSpec) -> list[Mapping[str, str]]:
    """Return dtypes by parameter name: each dtype in turn for all inputs that take it, the others their first."""
    names = dict.fromkeys(dtype for parameter in spec.inputs for dtype in parameter.dtypes)
    choices = [{p.name: name if name in p.dtypes else p.dtypes[0] for p in spec.inputs} for name in names]
    return [choice for number, choice in enumerate(choices) if choice not in choices[:number]]


def _cast(spec: OpSpec, drawn: Mapping[str, Array], dtypes: Mapping[str, str]) -> dict[str, Array | None]:
    """Return the drawn inputs in the order of the op's parameters and in `dtypes`; None stands for an absent one."""
    unknown = drawn.keys() - dtypes.keys()
    assert not unknown, f"{spec.identifier} has no input '{min(unknown, default='')}'"
    return {
        name: np.asarray(drawn[name]).astype(_data_type(dtype).numpy()) if name in drawn else None
        for name, dtype in dtypes.items()
    }


def _data_type(dtype: str) -> ir.DataType:
    """Return the ONNX type of a dtype as specs spell it."""
    return ir.DataType[{"float32": "FLOAT", "float64": "DOUBLE"}.get(dtype, dtype.upper())]


@dataclass(frozen=True)
class _Call:
    """One call of an op: all its inputs in order (None: absent) and all its attributes."""

    spec: OpSpec
    opset: int
    inputs: Mapping[str, Array | None]
    attributes: Mapping[str, Any]

    def __str__(self) -> str:
        inputs = ", ".join(f"{name} {info.dtype}{list(info.shape)}" for name, info in self._present().items())
        return f"{self.spec.identifier}({inputs}) at opset {self.opset}"

    def holds(self, reference: Callable[..., Array | Sequence[Array]], roundings: float) -> bool:
        """Check everything; False if onnxruntime has no kernel for the dtypes."""
        foretold = self.spec.infer(list(self._infos().values()), self.attributes)
        model = self._model(foretold)
        complaint = _checker_complaint(model)
        assert complaint is None, f"{self}: onnx's checker says of function and shape rule: {complaint}"
        feeds = {name: array for name, array in self.inputs.items() if array is not None}
        runs = _run(model, [feeds])
        if runs is None:
            return False
        actual = list(runs[0].values())
        found = tuple(map(_info, actual))
        assert found == tuple(foretold), f"{self}: the shape rule foretells {foretold}, onnxruntime returns {found}"
        self._check_values(actual, reference, roundings)
        self._check_kernel(foretold)
        return True

    def _infos(self) -> dict[str, TensorInfo | None]:
        return {name: None if array is None else _info(array) for name, array in self.inputs.items()}

    def _present(self) -> dict[str, TensorInfo]:
        return {name: info for name, info in self._infos().items() if info is not None}

    def _model(self, outputs: Sequence[TensorInfo]) -> ir.Model:
        """Return a model that makes this call, its function attached."""
        values = {name: ir.val(name, _data_type(info.dtype), info.shape) for name, info in self._present().items()}
        graph = ir.Graph(list(values.values()), [], nodes=[], opset_imports={"": self.opset}, name="call")
        model = ir.Model(graph, ir_version=ops.FUNCTIONS_IR_VERSION)
        node = ops.call(
            model, self.spec, [values.get(parameter.name) for parameter in self.spec.inputs], self.attributes
        )
        graph.append(node)
        for value, parameter, info in zip(node.outputs, self.spec.outputs, outputs, strict=True):
            value.name, value.type = parameter.name, ir.TensorType(_data_type(info.dtype))
            value.shape = ir.Shape([None] * len(info.shape))
            graph.outputs.append(value)
        for function in model.functions.values():
            foreign = {inner.domain for inner in function} - set(ONNX_DOMAINS)
            assert not foreign, f"{self}: its function uses ops of {', '.join(foreign)}; a meaning is in standard ops"
        return model

    def _check_values(
        self, actual: Sequence[Array], reference: Callable[..., Array | Sequence[Array]], roundings: float
    ) -> None:
        given = {name: array for name, array in self.inputs.items() if array is not None}
        coarsest = max((UNIT_ROUNDOFF.get(array.dtype.name, 0.0) for array in given.values()), default=0.0)
        wide = {name: a.astype(np.float64) if a.dtype.name in UNIT_ROUNDOFF else a for name, a in given.items()}
        expected = reference(**wide, **self.attributes)
        pairs = zip(actual, expected if isinstance(expected, list | tuple) else [np.asarray(expected)], strict=True)
        for parameter, (got, want) in zip(self.spec.outputs, pairs, strict=True):
            scale = max(1.0, float(np.abs(want[np.isfinite(want)]).max(initial=0.0)))
            unit = max(coarsest, UNIT_ROUNDOFF[got.dtype.name]) if got.dtype.name in UNIT_ROUNDOFF else 0.0
            np.testing.assert_allclose(
                got.astype(np.float64), want, rtol=0, atol=roundings * unit * scale, err_msg=f"{self}: {parameter.name}"
            )

    def _check_kernel(self, outputs: Sequence[TensorInfo]) -> None:
        if self.spec.kernel is None:
            return
        inputs, reuse = list(self._infos().values()), self.spec.kernel.reuse_rule()
        try:
            launch = self.spec.kernel.launch_rule()(inputs, outputs, self.attributes)
        except InputError:
            return  # a kernel may refuse shapes and types that the function takes
        found = re.search(rf"\b{re.escape(launch.entry)}\b", self.spec.kernel.read_source())
        assert found, f"{self}: the kernel's source has no entry '{launch.entry}'"
        if reuse is not None:
            again = reuse(inputs, outputs, self.attributes, launch.defines)
            assert again == launch, (
                f"{self}: the reuse rule launches its kernel as {again}, the launch rule as {launch}"
            )


def _info(array: Array) -> TensorInfo:
    return TensorInfo(array.shape, array.dtype.name)


def _run(model: ir.Model, samples: Sequence[Feeds]) -> list[Outputs] | None:
    """Return the outputs of `model`, run as it stands on the CPU; None if onnxruntime has no kernel for its types."""
    with tempfile.TemporaryDirectory() as folder:
        path = graph.save(model, Path(folder) / "model.onnx")
        try:
            session = create_session(path, "cpu", SessionSettings(optimization="disable"))
        except InputError as error:
            if type(error.__cause__).__name__ == "NotImplemented":
                return None
            raise
    with OnnxRuntimeRunner(session, "the model") as runner:
        return [runner.run(sample) for sample in samples]
