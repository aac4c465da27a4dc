"""Quantization: uniform affine schemes of 2 to 8 bits, post-training and in training.

The steps are `Quantize`, `QAT`, `Half` and `MixedPrecision`, which simulate, `Pack`, whose layers hold packed integers,
and `Recover`, which trains low-rank terms beside these. A simulating model exports with
`torch.onnx.export(model.eval(), args, path, dynamo=True)` to QuantizeLinear and DequantizeLinear pairs; `pack_weights`
on the loaded onnx.ModelProto then turns its float weights into integers, and must be called before the file is used;
`halve_weights` stores those of halved layers in FP16.
"""

from core.quantization.budget import choose_bits as choose_bits
from core.quantization.calibration import calibrate_range as calibrate_range
from core.quantization.compensation import Moments as Moments
from core.quantization.compensation import compensate as compensate
from core.quantization.error import layer_sqnr as layer_sqnr
from core.quantization.error import sqnr as sqnr
from core.quantization.error import weight_sqnr as weight_sqnr
from core.quantization.folding import find_folds as find_folds
from core.quantization.folding import fold as fold
from core.quantization.half import Half as Half
from core.quantization.half import half_layers as half_layers
from core.quantization.half import weights_alone as weights_alone
from core.quantization.layer_sensitivity import choose_precisions as choose_precisions
from core.quantization.layer_sensitivity import half_errors as half_errors
from core.quantization.layer_sensitivity import precision_errors as precision_errors
from core.quantization.layer_sensitivity import sensitivity_rows as sensitivity_rows
from core.quantization.mixed import MixedPrecision as MixedPrecision
from core.quantization.modules import QuantConv2d as QuantConv2d
from core.quantization.modules import Quantizer as Quantizer
from core.quantization.modules import QuantLinear as QuantLinear
from core.quantization.modules import quant_layers as quant_layers
from core.quantization.modules import unquantized as unquantized
from core.quantization.numerics import choose_qparams as choose_qparams
from core.quantization.numerics import dequantize as dequantize
from core.quantization.numerics import fake_quantize as fake_quantize
from core.quantization.numerics import quantize as quantize
from core.quantization.onnx_weights import halve_weights as halve_weights
from core.quantization.onnx_weights import pack_weights as pack_weights
from core.quantization.pack import Pack as Pack
from core.quantization.packed import PackedConv2d as PackedConv2d
from core.quantization.packed import PackedEmbedding as PackedEmbedding
from core.quantization.packed import PackedLinear as PackedLinear
from core.quantization.packed import empty_packed as empty_packed
from core.quantization.packed import expand as expand
from core.quantization.packed import pack_module as pack_module
from core.quantization.packed import packed_layers as packed_layers
from core.quantization.prepare import Plan as Plan
from core.quantization.prepare import calibrate as calibrate
from core.quantization.prepare import prepare as prepare
from core.quantization.ptq import Quantize as Quantize
from core.quantization.qat import QAT as QAT
from core.quantization.recover import Recover as Recover
from core.quantization.schemes import PerChannel as PerChannel
from core.quantization.schemes import PerGroup as PerGroup
from core.quantization.schemes import PerTensor as PerTensor
from core.quantization.schemes import Scheme as Scheme
from core.quantization.sensitivity import bit_errors as bit_errors
