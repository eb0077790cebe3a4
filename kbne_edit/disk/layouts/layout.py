"""The layout of a quantised checkpoint: which tensors make up which matrix of the unquantised model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...errors import CheckpointError, shown
from .base import Carrier, Format, Part, Shape
from .bitsandbytes import FourBits, Int8
from .codecs import CODECS
from .compressed_tensors import MXFP4, NVFP4, Naive, PackQuantized
from .fp8 import FP8
from .gptq import AWQ, GPTQ
from .hqq import HQQ
from .mxfp4 import MXFP4Experts
from .torchao import PerRow

# Tensor name -> the tensor as it is stored: BF16 as uint16, 8-bit floats as uint8.
ReadTensor = Callable[[str], np.ndarray]

METHODS = "compressed-tensors, gptq, awq, bitsandbytes, torchao, hqq, fp8, mxfp4"


@dataclass(frozen=True)
class Matrix:
    """One quantised matrix. parts: {part: tensor name}; about: {part: dtype and shape}."""

    name: str
    format: Format
    parts: dict[str, str]
    about: dict[str, Part]

    def shape(self, read: ReadTensor) -> Shape:
        return self.format.shape(self.about, self._part(read))

    def carrier(self, read: ReadTensor) -> Carrier | str:
        """What carries the factors of rows, or the reason why nothing can."""
        return self.format.carrier(self.about, self._part(read))

    def dequantise(self, read: ReadTensor) -> np.ndarray:
        """[O, I] float32."""
        return self.format.dequantise({part: read(name) for part, name in self.parts.items()}, self.about)

    def _part(self, read: ReadTensor) -> Callable[[str], np.ndarray]:
        return lambda part: read(self.parts[part])


class Layout:
    """A quantised checkpoint, seen as the unquantised ("plain") one.

    matrices: {name of the plain tensor: Matrix}.
    """

    def __init__(self, method: str, matrices: dict[str, Matrix], tensors: Mapping[str, Part], read: ReadTensor):
        self.method, self.matrices, self._tensors, self._read = method, matrices, tensors, read
        taken = {name for matrix in matrices.values() for name in matrix.parts.values()}
        self.shapes: dict[str, Shape] = {name: part.shape for name, part in tensors.items() if name not in taken}
        self.shapes |= {name: matrix.shape(read) for name, matrix in matrices.items()}

    @property
    def formats(self) -> list[str]:
        """The formats in use, for messages."""
        return sorted({matrix.format.name for matrix in self.matrices.values()})

    def names(self, name: str) -> list[str]:
        """The names of the stored tensors that make up a plain tensor."""
        matrix = self.matrices.get(name)
        return list(matrix.parts.values()) if matrix else [name]

    def matrix_of(self, part: str) -> str | None:
        """The plain tensor that a stored tensor is a part of."""
        for name, matrix in self.matrices.items():
            if part in matrix.parts.values():
                return name
        return None

    def read(self, name: str) -> np.ndarray:
        """A plain tensor, float32. Raises CheckpointError if its parts do not fit together."""
        matrix = self.matrices.get(name)
        if matrix is None:
            return CODECS[self._tensors[name].dtype].values(self._read(name)).astype(np.float32)
        try:
            values = matrix.dequantise(self._read)
        except (ValueError, IndexError, KeyError, TypeError, ZeroDivisionError) as error:
            raise CheckpointError(
                f"the parts of {shown(name)} do not fit together as {matrix.format.name}: {shown(str(error))}"
            ) from None
        if values.shape != self.shapes[name]:
            raise CheckpointError(
                f"{shown(name)} dequantises to the shape {list(values.shape)}: its parts do not fit together"
            )
        return values


def layout_of(config: dict[str, Any], tensors: Mapping[str, Part], read: ReadTensor) -> Layout | None:
    """The layout of a checkpoint with this config.json and these tensors; None if it is not quantised.

    Raises CheckpointError for an unknown format, for tensors that no format explains, and for FP8 weights without a
    scale: read as plain numbers they would be wrong by orders of magnitude.
    """
    settings = quantisation(config)
    if settings is None:
        if eights := [name for name, part in tensors.items() if part.dtype.startswith("F8_")]:
            raise CheckpointError(
                f"{shown(eights[0])} is stored as FP8, and config.json has no quantization_config: "
                "its scale is not known"
            )
        return None
    method = settings["quant_method"]
    try:
        formats = _formats(method, settings)
        matrices = _matrices(tensors, formats)
        layout = Layout(method, matrices, tensors, read)
    except KeyError as error:
        raise CheckpointError(f"quantization_config ({method}) has no {shown(error.args[0])}") from None
    except (TypeError, ValueError, AttributeError, IndexError) as error:
        raise CheckpointError(f"quantization_config ({method}) cannot be read: {shown(str(error))}") from None
    for name in layout.shapes:
        if name not in matrices and tensors[name].dtype not in _PLAIN:
            raise CheckpointError(
                f"{shown(name)} is stored as {tensors[name].dtype}, which {method} does not explain: "
                "its scale is not known"
            )
    return layout


_PLAIN = ("BF16", "F16", "F32", "F64")


def quantisation(config: dict[str, Any]) -> dict[str, Any] | None:
    """The quantization_config of a config.json, with its quant_method. Raises CheckpointError."""
    part = config.get("text_config")
    places = (config, part) if isinstance(part, dict) else (config,)
    for key in ("quantization_config", "compression_config"):
        for place in places:
            if settings := place.get(key):
                if not isinstance(settings, dict):
                    raise CheckpointError(f"config.json: {key} is not an object")
                method = settings.get("quant_method")
                if method is None and settings.get("load_in_4bit", settings.get("load_in_8bit")) is not None:
                    method = "bitsandbytes"
                if method is None and "config_groups" in settings:
                    method = "compressed-tensors"
                return {**settings, "quant_method": method}
    return None


def _formats(method: object, settings: dict[str, Any]) -> list[Format]:
    """The formats that this quantisation method can produce."""
    if method == "compressed-tensors":
        groups = [group.get("weights") or {} for group in settings["config_groups"].values()]
        bits = {group["num_bits"] for group in groups if group.get("type", "int") == "int"}
        blocks = [group["block_structure"] for group in groups if group.get("block_structure")]
        if len(bits) > 1:
            raise CheckpointError(f"config.json mixes integers of {sorted(bits)} bits: one width is supported")
        packed = [PackQuantized(int(n)) for n in bits]
        return [*packed, NVFP4(), MXFP4(), Naive(tuple(blocks[0]) if blocks else None)]
    if method == "gptq":
        offset = 0 if settings.get("checkpoint_format") == "gptq_v2" else 1
        return [GPTQ(settings["bits"], settings["group_size"], offset)]
    if method == "awq":
        if settings.get("bits", settings.get("w_bit")) != 4 or str(settings.get("version", "gemm")).lower() != "gemm":
            raise CheckpointError("AWQ in another layout than gemm with 4 bits is not supported")
        return [AWQ()]
    if method == "bitsandbytes":
        return [Int8(), FourBits("nf4"), FourBits("fp4")]
    if method == "torchao":
        return [PerRow()]
    if method == "hqq":
        about = settings.get("quant_config", settings)
        about = about.get("weight_quant_params", about)
        return [HQQ(about["nbits"], about["group_size"], about["axis"])]
    if method == "fp8":
        block = settings.get("weight_block_size")
        return [FP8((int(block[0]), int(block[1])) if block else None)]
    if method == "mxfp4":
        return [MXFP4Experts()]
    raise CheckpointError(
        f"config.json has quantization_config ({shown(method)}), which is not supported ({METHODS} and GGUF are): "
        "edit the unquantised model and quantise the result"
    )


def _matrices(tensors: Mapping[str, Part], formats: Iterable[Format]) -> dict[str, Matrix]:
    """{plain tensor: Matrix}, each with the first format that fits its parts."""
    suffixes = sorted({part for known in formats for part in (*known.needs, *known.may)}, key=len, reverse=True)
    groups: dict[str, dict[str, str]] = {}
    for name in tensors:
        for suffix in suffixes:
            begin = name.removesuffix(suffix)
            if begin != name and (begin.endswith(".") or suffix in ("_blocks", "_scales")):
                groups.setdefault(begin.removesuffix("."), {})[suffix] = name
                break
    matrices = {}
    for name, parts in groups.items():
        about = {part: tensors[tensor] for part, tensor in parts.items()}
        fitting = next((known for known in formats if known.fits(about)), None)
        if fitting is not None:
            known_parts = {*fitting.needs, *fitting.may}
            kept = {part: tensor for part, tensor in parts.items() if part in known_parts}
            plain = name + fitting.weight
            matrices[plain] = Matrix(plain, fitting, kept, {part: about[part] for part in kept})
    return matrices
