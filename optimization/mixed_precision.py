"""Training in 16 bits with float32 weights."""

import torch
from torch import Tensor, nn

from core.errors import UserError


class MixedPrecision:
    """16-bit autocast, and a gradient scaler where the 16 bits are fp16.

        amp = MixedPrecision(model, optimizer)
        for batch in batches:
            with amp.autocast():
                loss = model(**batch).loss
            amp.step(loss)

    bf16 has float32's range and needs no scaler. fp16 gradients underflow: the loss is multiplied by a scale, and a
    step whose gradients overflow is skipped and the scale halved.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        dtype: torch.dtype | None = None,
        max_grad_norm: float | None = 1.0,
    ) -> None:
        """`dtype` None: bf16 where the device computes in it, else fp16. float32 switches autocast off.

        Raises:
            UserError: 16-bit weights (updates would round to nothing), or fp16 with an optimizer that updates in
                backward.
        """
        self.device = next(model.parameters()).device
        self.dtype = dtype or _best_dtype(self.device)
        self.max_grad_norm = max_grad_norm
        self._parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._optimizer = optimizer
        if any(parameter.dtype != torch.float32 for parameter in self._parameters):
            raise UserError(
                "mixed precision with trainable weights in 16 bits",
                expected="float32 weights: autocast computes in 16 bits, the optimizer adds up in 32",
                remedy="model.float() before the optimizer is made",
            )
        self.scaler = torch.amp.GradScaler(self.device.type) if self.dtype == torch.float16 else None
        if self.scaler is not None and hasattr(optimizer, "grad_func"):
            raise UserError(
                "fp16 with AdaLomo, which updates before gradients can be unscaled",
                expected="bf16, or another optimizer",
                remedy="mixed_precision(model, optimizer, dtype=torch.bfloat16)",
            )

    def autocast(self) -> torch.autocast:
        """The context of the forward and the loss."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def step(self, loss: Tensor) -> bool:
        """Backward, clip, update, forget the gradients. False: the gradients overflowed and nothing was updated."""
        self.backward(loss)
        return self.update()

    def backward(self, loss: Tensor) -> None:
        """Add up gradients; call it several times before one `update` to accumulate."""
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()

    def update(self) -> bool:
        """Clip to `max_grad_norm`, update, forget the gradients; False as in `step`."""
        if self.scaler is not None:
            self.scaler.unscale_(self._optimizer)
        if self.max_grad_norm is not None:
            nn.utils.clip_grad_norm_(self._parameters, self.max_grad_norm)
        if self.scaler is None:
            self._optimizer.step()
            updated = True
        else:
            scale_before = self.scaler.get_scale()
            self.scaler.step(self._optimizer)
            self.scaler.update()
            updated = self.scaler.get_scale() >= scale_before
        self._optimizer.zero_grad(set_to_none=True)
        return updated


def _best_dtype(device: torch.device) -> torch.dtype:
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.float16
    return torch.bfloat16
