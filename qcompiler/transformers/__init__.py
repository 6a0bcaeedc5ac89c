"""qcompiler as a quantization method of transformers.

    import qcompiler.transformers
    from qcompiler.transformers import QCompilerConfig

    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=QCompilerConfig("fp8_tile"))
    print(model.qcompiler_report)
    model.save_pretrained(out)                      # quant_method "qcompiler"
    AutoModelForCausalLM.from_pretrained(out)       # the same codes and scales

Importing this package registers the method, which transformers does not find by other means. Layers stay modules of
the model: `generate`, caches, batching, torch.compile and adapters work as before, and nothing is fused across layers.
"""

from qcompiler.transformers.config import QCompilerConfig as QCompilerConfig
from qcompiler.transformers.linear import QuantizedLinear as QuantizedLinear
from qcompiler.transformers.quantizer import QCompilerQuantizer as QCompilerQuantizer
from qcompiler.transformers.report import LayerReport as LayerReport
