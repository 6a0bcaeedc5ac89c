"""The CPU: plain torch, with the numerics of the kernels; it runs any format."""

from qcompiler.runtime.device import Target, register

CPU = register(
    Target(
        "cpu", "cpu", "plain torch, with the numerics of the kernels", kernels="from codegen.direct import kernels"
    )
)  # fmt: skip
