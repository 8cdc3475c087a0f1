"""Training in 16 bits with float32 weights."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from core.errors import UserError
from optimization.gpu import computes_in_bf16


class LossScaler(torch.amp.GradScaler):
    """Gradient scaler of torch that scales in fp16 only; elsewhere its calls do nothing and `step` is the optimizer's.

    A loop that computes in fp16 on its own (`torch.autocast("cuda")` does) switches it on in its first forward,
    whatever was chosen before.
    """

    def __init__(self, device_type: str, dtype: torch.dtype, *, updates_in_backward: bool) -> None:
        super().__init__(device_type, enabled=dtype == torch.float16)
        self._updates_in_backward = updates_in_backward
        if dtype == torch.float16:
            self._refuse_updates_in_backward()

    def before_forward(self, model: nn.Module, args: Any) -> None:
        """Forward pre-hook of the model: notes which type this forward computes in."""
        computes_in_fp16 = (
            torch.is_autocast_enabled(self._device) and torch.get_autocast_dtype(self._device) == torch.float16
        )
        if computes_in_fp16 and not self.is_enabled():
            self._refuse_updates_in_backward()
            torch.amp.GradScaler.__init__(self, self._device)

    def _refuse_updates_in_backward(self) -> None:
        if self._updates_in_backward:
            raise UserError(
                "fp16 with AdaLomo, which updates before gradients can be unscaled",
                expected="bf16, or another optimizer",
                remedy="mixed_precision(model, optimizer, dtype=torch.bfloat16), and autocast in the same type",
            )


class MixedPrecision:
    """16-bit autocast, and a gradient scaler where the 16 bits are fp16.

        amp = MixedPrecision(model, optimizer)
        for batch in batches:
            with amp.autocast():
                loss = model(**batch).loss
            amp.step(loss)

    The same in the calls of torch, for a loop that has them already; `scaler` does nothing where there is nothing to
    scale:

        model, optimizer, scaler = MixedPrecision(model, optimizer)
        for batch in batches:
            with torch.autocast(model.device.type, torch.bfloat16):
                loss = model(**batch).loss
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()

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
        self._model, self._optimizer = model, optimizer
        if any(parameter.dtype != torch.float32 for parameter in self._parameters):
            raise UserError(
                "mixed precision with trainable weights in 16 bits",
                expected="float32 weights: autocast computes in 16 bits, the optimizer adds up in 32",
                remedy="model.float() before the optimizer is made",
            )
        self.scaler = LossScaler(self.device.type, self.dtype, updates_in_backward=hasattr(optimizer, "grad_func"))
        model.register_forward_pre_hook(self.scaler.before_forward)

    def __iter__(self) -> Iterator[Any]:
        """`model, optimizer, scaler = MixedPrecision(model, optimizer)`."""
        return iter((self._model, self._optimizer, self.scaler))

    def autocast(self) -> torch.autocast:
        """The context of the forward and the loss."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def step(self, loss: Tensor) -> bool:
        """Backward, clip, update, forget the gradients. False: the gradients overflowed and nothing was updated."""
        self.backward(loss)
        return self.update()

    def backward(self, loss: Tensor) -> None:
        """Add up gradients; call it several times before one `update` to accumulate."""
        self.scaler.scale(loss).backward()

    def update(self) -> bool:
        """Clip to `max_grad_norm`, update, forget the gradients; False as in `step`."""
        self.scaler.unscale_(self._optimizer)
        if self.max_grad_norm is not None:
            nn.utils.clip_grad_norm_(self._parameters, self.max_grad_norm)
        scale_before = self.scaler.get_scale()
        self.scaler.step(self._optimizer)
        self.scaler.update()
        self._optimizer.zero_grad(set_to_none=True)
        return self.scaler.get_scale() >= scale_before


def _best_dtype(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if computes_in_bf16(device) else torch.float16
