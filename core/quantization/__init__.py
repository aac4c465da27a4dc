"""Quantization: uniform affine schemes of 2 to 8 bits, post-training and in training.

The steps are `Quantize` and `QAT`. A quantized model exports with `torch.onnx.export(model.eval(), args, path,
dynamo=True)` to QuantizeLinear and DequantizeLinear pairs; `pack_weights` on the loaded onnx.ModelProto then turns
its float weights into integers, and must be called before the file is used.
"""

from core.quantization.calibration import calibrate_range as calibrate_range
from core.quantization.error import layer_sqnr as layer_sqnr
from core.quantization.error import sqnr as sqnr
from core.quantization.error import weight_sqnr as weight_sqnr
from core.quantization.folding import find_folds as find_folds
from core.quantization.folding import fold as fold
from core.quantization.modules import QuantConv2d as QuantConv2d
from core.quantization.modules import Quantizer as Quantizer
from core.quantization.modules import QuantLinear as QuantLinear
from core.quantization.modules import quant_layers as quant_layers
from core.quantization.modules import unquantized as unquantized
from core.quantization.numerics import choose_qparams as choose_qparams
from core.quantization.numerics import dequantize as dequantize
from core.quantization.numerics import fake_quantize as fake_quantize
from core.quantization.numerics import quantize as quantize
from core.quantization.onnx_weights import pack_weights as pack_weights
from core.quantization.prepare import Plan as Plan
from core.quantization.prepare import calibrate as calibrate
from core.quantization.prepare import prepare as prepare
from core.quantization.ptq import Quantize as Quantize
from core.quantization.qat import QAT as QAT
from core.quantization.schemes import PerChannel as PerChannel
from core.quantization.schemes import PerGroup as PerGroup
from core.quantization.schemes import PerTensor as PerTensor
from core.quantization.schemes import Scheme as Scheme
