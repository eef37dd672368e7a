"""Linear maps, on the faster of PyTorch's two float32 matrix products.

On x86 processors PyTorch carries two libraries for products of matrices. `nn.Linear` in float32 uses
MKL, which leaves the AVX-512 units of AMD's processors unused; oneDNN uses them (measured in
BENCHMARKS.md). Both round in the same way, to different last bits.
"""

import torch
from torch import Tensor, nn
from torch.autograd.forward_ad import make_dual, unpack_dual

_onednn = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None


class Linear(nn.Linear):
    """`nn.Linear`; where no gradient is asked for, its float32 product on a CPU runs in oneDNN.

    The derivative of a dual number along its tangent is such a product too, without the bias.
    `torch.backends.mkldnn.enabled = False` keeps to `nn.Linear`'s own.
    """

    def forward(self, x: Tensor) -> Tensor:
        """x @ weight.T + bias: [..., in_features] -> [..., out_features]."""
        if _onednn is None or not self._is_plain_product_of(x):
            return super().forward(x)
        value, tangent = unpack_dual(x)
        made = _onednn(value, self.weight, self.bias, "none", [], "")
        return made if tangent is None else make_dual(made, _onednn(tangent, self.weight, None, "none", [], ""))

    def _is_plain_product_of(self, x: Tensor) -> bool:
        """Whether this is inference in float32 on the CPU: oneDNN's product knows no derivatives and no vmap."""
        if torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or not torch.backends.mkldnn.enabled:
            return False
        if torch.compiler.is_compiling():  # the compiler chooses its own product
            return False
        tensors = [x, self.weight] if self.bias is None else [x, self.weight, self.bias]
        return (
            all(tensor.dtype == torch.float32 and tensor.device.type == "cpu" for tensor in tensors)
            and torch._C._functorch.peek_interpreter_stack() is None  # no torch.func transform is under way
            and all(unpack_dual(weight).tangent is None for weight in tensors[1:])
        )
