"""A torch.export program beside the weights: inference without the model's source.

The program is an ordinary archive of torch.export, but for its weights, which stand in it as single
zeros: the real ones are the checkpoint's, stored once. Sample inputs are left out, because torch
stores them as a pickle.

torch.export.load() unpickles in many places and evaluates texts, so an archive is looked through
before it is given to it.
"""

from __future__ import annotations

import io
import json
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from stillframe.errors import DataLoss, InvalidArgument

PROGRAM_PART = "program"
# Every part but the model's begins its tensors' names with its own.
ARCHIVE_NAME = "program.pt2"

_ARCHIVE_BYTES_MAX = 1 << 32
_TEXT_BYTES_MAX = 1 << 28
# What an operator may be called: nothing else of torch can be reached from a program.
_OPERATOR = re.compile(r"(torch\.ops(\.\w+)+|_operator\.\w+|math\.\w+|torch\.sym_\w+)")
# Arithmetic over symbols, and constructors of it: no attribute, no text but a symbol's name, no
# call of anything else, so that evaluating it computes a number.
_EXPRESSION = re.compile(r"(?:(?!__)\w|[\s()+\-*/%,<>=!&|~]|'\w+'|(?<=\d)\.(?=\d))*")
_CALL = re.compile(r"(\w+|\))\s*\(")
_CALLED = frozenset(
    {"Symbol", "Integer", "Rational", "Float", "Add", "Mul", "Pow", "Max", "Min", "Abs", "Mod"}
    | {"Eq", "Ne", "Equality", "Unequality", "GreaterThan", "LessThan", "StrictGreaterThan"}
    | {"StrictLessThan", "And", "Or", "Not", "Piecewise", "floor", "ceiling", "FloorDiv"}
    | {"ModularIndexing", "Where", "PythonMod", "CleanDiv", "CeilToInt", "FloorToInt", "CeilDiv"}
    | {"LShift", "RShift", "PowByNatural", "FloatPow", "FloatTrueDiv", "IntTrueDiv", "ToFloat"}
    | {"TruncToFloat", "TruncToInt", "RoundToInt", "RoundDecimal", "Identity"}
    | {"IsNonOverlappingAndDenseIndicator"}
)


def export_program(
    model: nn.Module, example_inputs: Any, dynamic_shapes: Any = None
) -> torch.export.ExportedProgram:
    """Export a model in eval mode; its training flags are as before afterwards.

    Args:
        model: the bare model.
        example_inputs: a tensor, a tuple of positional arguments, or a dict of keyword arguments.
        dynamic_shapes: as for torch.export.export().

    Raises:
        InvalidArgument: torch.export cannot export it; its own error is the cause.
    """
    arguments: tuple[Any, ...] = ()
    keywords: dict[str, Any] = {}
    if isinstance(example_inputs, Mapping):
        keywords = dict(example_inputs)
    elif isinstance(example_inputs, tuple):
        arguments = example_inputs
    else:
        arguments = (example_inputs,)
    flags = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in flags:
            module.training = False
        with torch.no_grad():
            return torch.export.export(
                model, arguments, keywords or None, dynamic_shapes=dynamic_shapes
            )
    except Exception as error:
        raise InvalidArgument(
            f"torch.export cannot export the model with these example_inputs: {error}; save it "
            "without example_inputs, with config= or factory="
        ) from error
    finally:
        for module, flag in flags:
            module.training = flag


def pack_program(program: torch.export.ExportedProgram, stored: set[str]) -> Tensor:
    """The archive as bytes, [n] uint8, without the weights that are stored elsewhere.

    Raises:
        InvalidArgument: the program has what could only be loaded by unpickling.
    """
    for name, tensor in list(program.state_dict.items()):
        if name in stored:
            program.state_dict[name] = _stand_in(tensor)
    program.example_inputs = None
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        # That no tensor of a stand-in's storage is complete is what we want.
        warnings.simplefilter("ignore")
        torch.export.save(program, buffer)
    archive = buffer.getvalue()
    if reasons := list(unsafe_contents(archive)):
        raise InvalidArgument(
            f"the exported program could only be loaded by unpickling ({'; '.join(reasons)}); "
            "save the model without example_inputs"
        )
    return torch.frombuffer(bytearray(archive), dtype=torch.uint8)


def unpack_program(
    archive: bytes, weights: Mapping[str, Tensor], *, allow_pickle: bool, what: str
) -> nn.Module:
    """Make the program's module over these weights.

    Raises:
        InvalidArgument: loading would unpickle or run foreign code, and `allow_pickle` is not set.
        DataLoss: it is no program, or needs weights that are not there.
    """
    try:
        reasons = list(unsafe_contents(archive))
    except (KeyError, TypeError, ValueError, zipfile.BadZipFile) as error:
        raise DataLoss(f"{what}: the program is no archive of torch.export: {error}") from error
    if reasons and not allow_pickle:
        raise InvalidArgument(
            f"{what}: loading its program would run what it brings along ({'; '.join(reasons)}); "
            "pass allow_pickle=True only if you trust these files"
        )
    try:
        program = torch.export.load(io.BytesIO(archive))
    except Exception as error:
        raise InvalidArgument(
            f"{what}: torch {torch.__version__} cannot load its program: {error}; pass factory="
        ) from error
    for name, tensor in program.state_dict.items():
        if name in weights:
            new = weights[name]
            if new.shape != tensor.shape or new.dtype is not tensor.dtype:
                raise DataLoss(f"{what}: the program wants another {name} than is stored")
            is_parameter = isinstance(tensor, nn.Parameter)
            program.state_dict[name] = (
                nn.Parameter(new, requires_grad=tensor.requires_grad) if is_parameter else new
            )
    # The guards are code in the archive; torch's own checks of inputs stay.
    module = program.module(check_guards=False)
    assert isinstance(module, nn.Module)
    for one in module.modules():
        one.training = False
    return module


def unsafe_contents(archive: bytes) -> Iterator[str]:
    """What in an archive of torch.export would be unpickled, loaded as code, or evaluated."""
    with zipfile.ZipFile(io.BytesIO(archive)) as opened:
        if sum(entry.file_size for entry in opened.infolist()) > _ARCHIVE_BYTES_MAX:
            yield "it is too large"
            return
        for entry in opened.infolist():
            name = entry.filename.partition("/")[2]
            if name.startswith("models/") and name.endswith(".json"):
                yield from _unsafe_graph(_read_json(opened, entry), name)
            elif name.startswith(("data/weights/", "data/constants/")) and name.endswith(".json"):
                config = _read_json(opened, entry)
                for key, payload in config["config"].items():
                    path = str(payload["path_name"])
                    if payload["use_pickle"] or not path.startswith(("weight_", "tensor_")):
                        yield f"{key} is a pickle"
            elif name.startswith(("data/weights/", "data/constants/")):
                if name.endswith(".pt"):
                    yield f"{name} is a pickle"
            elif name.startswith("data/sample_inputs/"):
                if entry.file_size:
                    yield f"{name} is a pickle"
            elif name.startswith(("data/aotinductor/", "extra/")) or name.endswith((".so", ".py")):
                yield f"{name} is code"


def _read_json(opened: zipfile.ZipFile, entry: zipfile.ZipInfo) -> Any:
    if entry.file_size > _TEXT_BYTES_MAX:
        raise ValueError(f"{entry.filename} has {entry.file_size} bytes")
    return json.loads(opened.read(entry))


def _unsafe_graph(graph: Any, name: str) -> Iterator[str]:
    """Texts of a graph that torch would evaluate, or that name more than an operator."""
    waiting = [graph]
    while waiting:
        one = waiting.pop()
        if isinstance(one, list):
            waiting.extend(one)
            continue
        if not isinstance(one, dict):
            continue
        for key, value in one.items():
            if key == "expr_str" and not (isinstance(value, str) and _EXPRESSION.fullmatch(value)):
                yield f"{name} has the expression {str(value)[:80]!r}"
            elif key == "target" and isinstance(value, str) and "inputs" in one:
                if not _OPERATOR.fullmatch(value):
                    yield f"{name} calls {value[:80]!r}"
            else:
                waiting.append(value)


def _is_arithmetic(text: Any) -> bool:
    return (
        isinstance(text, str)
        and _EXPRESSION.fullmatch(text) is not None
        and _CALLED.issuperset(_CALL.findall(text))
    )


def _stand_in(tensor: Tensor) -> Tensor:
    zero = torch.zeros((), dtype=tensor.dtype).expand(tensor.shape)
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(zero, requires_grad=tensor.requires_grad)
    return zero
