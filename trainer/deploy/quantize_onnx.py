"""The weights of an ONNX graph in fewer bits, by ONNX Runtime's own tools."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sharding.ranks.errors import UserError
from trainer.config.quantization import BLOCK_SIZE, QuantizationMethod

_MAX_PROTOBUF_BYTES = 2 * 10**9
_QUANTIZED_OPERATORS = frozenset(
    ("MatMulNBits", "MatMulInteger", "ConvInteger", "DynamicQuantizeMatMul", "DynamicQuantizeLSTM", "QAttention")
)


def quantize_onnx(file: Path, to: Path, method: QuantizationMethod) -> float:
    """Write a graph whose weights are quantized, one file where it fits, else with ``.data`` beside it.

    Args:
        file: the graph; what lies beside it is read and not changed.
        to: the file to write.
        method: how. ``int8-dynamic`` is ``quantize_dynamic``, with scales of each tensor; the others quantize matrices
            that are multiplied with in blocks of 32 weights, and leave convolutions and LSTMs alone.

    Returns:
        Share of the weights that are quantized, by their number.

    Raises:
        UserError: the packages that do it are not installed, the graph is quantized already, or has no weight that the
            method quantizes.
    """
    try:
        import onnx
    except ImportError:
        raise _missing(method, "onnx") from None
    graph = onnx.load(file)
    if any(node.op_type in _QUANTIZED_OPERATORS for node in graph.graph.node):
        raise UserError(f"{file} is quantized already; name the folder that it was made of.")
    before = num_float_weights(graph)
    is_large = graph.ByteSize() > _MAX_PROTOBUF_BYTES
    with _quiet():
        if method == "int8-dynamic":
            _quantize_dynamic(graph, to, is_large=is_large)
        else:
            _quantize_weights(graph, to, 8 if method == "int8-weight" else 4, is_large=is_large)
    after = num_float_weights(onnx.load(to, load_external_data=False))
    share = 1.0 - after / max(before, 1)
    if share <= 0.0:
        raise UserError(
            f"--method {method}: {file} has no weight that it quantizes; choose another method, or serve the model as "
            "it is."
        )
    return share


def num_float_weights(model: Any) -> int:
    """Elements of an ONNX model's weights that are in a floating-point format and have two dimensions or more."""
    from onnx import TensorProto

    formats = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16)
    total = 0
    for tensor in model.graph.initializer:
        # Scales of quantized blocks are no weights.
        if tensor.data_type in formats and len(tensor.dims) > 1 and not tensor.name.endswith("_scales"):
            size = 1
            for dim in tensor.dims:
                size *= dim
            total += size
    return total


def _quantize_dynamic(graph: Any, to: Path, *, is_large: bool) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    # Unsigned weights: products of signed ones overflow on processors without VNNI, and nobody knows where it will run.
    quantize_dynamic(graph, to, weight_type=QuantType.QUInt8, use_external_data_format=is_large)


def _quantize_weights(graph: Any, to: Path, num_bits: int, *, is_large: bool) -> None:
    try:
        from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
        from onnxruntime.quantization.onnx_model import ONNXModel
    except ImportError as error:
        raise _missing(f"int{num_bits}-weight", error.name or "onnxruntime") from None
    # Linear layers are exported as Gemm, which the tool does not know.
    model = ONNXModel(graph)
    model.replace_gemm_with_matmul()
    quantizer = MatMulNBitsQuantizer(model.model, bits=num_bits, block_size=BLOCK_SIZE, is_symmetric=True)
    quantizer.process()
    quantizer.model.save_model_to_file(str(to), is_large)


@contextmanager
def _quiet() -> Iterator[None]:
    """Within, the tools' advice is not printed; the root logger, which importing one sets up, is as before."""
    root = logging.getLogger()
    handlers, level, disabled = list(root.handlers), root.level, logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(disabled)
        root.handlers[:] = handlers
        root.setLevel(level)


def _missing(method: str, package: str) -> UserError:
    return UserError(
        f"--method {method} of an ONNX folder needs {package}, which is not installed; install it with pip install "
        "'shardline[export]'."
    )
