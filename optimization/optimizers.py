"""Optimizers by short name, through torch, bitsandbytes, transformers and the optimizers' own libraries."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from core.errors import UserError

_APOLLO_RANK = 128


def get_optimizer(model: nn.Module, name: str, lr: float, weight_decay: float = 0.0) -> torch.optim.Optimizer:
    """An optimizer over the trainable parameters of `model`; use it as any torch optimizer.

    Names: `OPTIMIZERS`. Decoupled weight decay throughout. 8-bit states are block-wise (one scale per 256 values), and
    tensors below 4096 values keep 32-bit ones. Paged states may be moved to host memory by the driver when the GPU is
    full; on a CPU paged is plain. `adalomo` updates inside `backward` and frees each gradient at once: no gradient
    accumulation, no clipping, no fp16 scaler. `apollo` scales gradients by a low-rank Adam (rank 128); its package is
    licensed for non-commercial use (CC-BY-NC).

    Raises:
        UserError: unknown name, nothing to train, or the optimizer's library is not installed.
    """
    if name not in OPTIMIZERS:
        raise UserError(
            f"optimizer {name!r}", expected="one of " + ", ".join(OPTIMIZERS), remedy="choose a name of the list"
        )
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError(
            "a model without trainable parameters",
            expected="at least one parameter with requires_grad",
            remedy="unfreeze it, or add a LoRA adapter",
        )
    return OPTIMIZERS[name](model, lr, weight_decay)


def _trainable(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _adamw(model: nn.Module, lr: float, weight_decay: float) -> torch.optim.Optimizer:
    """Fused: no temporary copy of the parameters in `step`."""
    return torch.optim.AdamW(_trainable(model), lr=lr, weight_decay=weight_decay, fused=True)


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon for the matrices inside the blocks, AdamW for embeddings, head and vectors; one learning rate for both.

    Muon's update is scaled to the size of AdamW's (arXiv 2502.16982), so that AdamW's learning rates carry over.
    """

    def __init__(self, model: nn.Module, lr: float, weight_decay: float) -> None:
        tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
        if (head := model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None) is not None:
            tables.add(id(head.weight))
        matrices = [p for p in _trainable(model) if p.ndim == 2 and id(p) not in tables]
        others = [p for p in _trainable(model) if p.ndim != 2 or id(p) in tables]
        muon = torch.optim.Muon(matrices, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
        adamw = torch.optim.AdamW(others, lr=lr, weight_decay=weight_decay, betas=(0.9, 0.95), fused=True)
        self._parts = (muon, adamw)
        super().__init__(matrices + others, {"lr": lr})
        self.param_groups = [*muon.param_groups, *adamw.param_groups]  # a scheduler changes the parts' own groups

    def step(self, closure: None = None) -> None:
        for part in self._parts:
            part.step()

    def state_dict(self) -> dict[str, Any]:
        return {"parts": [part.state_dict() for part in self._parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for part, state in zip(self._parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self.param_groups = [group for part in self._parts for group in part.param_groups]


def _adafactor(model: nn.Module, lr: float, weight_decay: float) -> torch.optim.Optimizer:
    from transformers import Adafactor

    return Adafactor(
        _trainable(model), lr=lr, weight_decay=weight_decay, scale_parameter=False, relative_step=False, beta1=None
    )


def _bitsandbytes(class_name: str) -> Callable[[nn.Module, float, float], torch.optim.Optimizer]:
    def make(model: nn.Module, lr: float, weight_decay: float) -> torch.optim.Optimizer:
        import bitsandbytes as bnb

        return getattr(bnb.optim, class_name)(_trainable(model), lr=lr, weight_decay=weight_decay)

    return make


def _apollo(model: nn.Module, lr: float, weight_decay: float) -> torch.optim.Optimizer:
    try:
        from apollo_torch import APOLLOAdamW
    except ImportError as error:
        raise _not_installed("apollo", "apollo-torch") from error
    matrices = [parameter for parameter in _trainable(model) if parameter.ndim == 2]
    others = [parameter for parameter in _trainable(model) if parameter.ndim != 2]
    low_rank = {
        "params": matrices,
        "rank": _APOLLO_RANK,
        "proj": "random",
        "scale_type": "channel",
        "scale": 1.0,
        "update_proj_gap": 200,
        "proj_type": "std",
    }
    return APOLLOAdamW([{"params": others}, low_rank], lr=lr, weight_decay=weight_decay)


def _adalomo(model: nn.Module, lr: float, weight_decay: float) -> torch.optim.Optimizer:
    try:
        from lomo_optim import AdaLomo
    except ImportError as error:
        raise _not_installed("adalomo", "lomo-optim") from error

    class SteppedAdaLomo(AdaLomo):
        """AdaLomo in the loop of every other optimizer: `loss.backward(); step(); zero_grad()`.

        The library wants `fused_backward(loss, lr)` in place of the three, and ignores schedulers.
        """

        def step(self, closure: Callable[[], float] | None = None) -> None:
            self.grad_func(None)  # the last gradient has no later hook that would use it
            self.step_num += 1
            self.lr = self.param_groups[0]["lr"]

    device = next(model.parameters()).device
    with _CudaMeans(device):  # the library calls `.cuda()` on every state
        optimizer = SteppedAdaLomo(model, lr=lr, weight_decay=weight_decay, loss_scale=None)
    optimizer.step_num = 1  # its decay of the second moment is 1 - step ** -0.8
    return optimizer


class _CudaMeans(TorchFunctionMode):
    """`tensor.cuda()` moves to `device`."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.cuda:
            return args[0].to(self.device)
        return func(*args, **(kwargs or {}))


def _not_installed(name: str, package: str) -> UserError:
    return UserError(
        f"optimizer {name!r} without its library",
        expected=f"the package {package}",
        remedy=f"pip install --no-deps {package}",
    )


OPTIMIZERS: dict[str, Callable[[nn.Module, float, float], torch.optim.Optimizer]] = {
    "adamw": _adamw,
    "adam8bit": _bitsandbytes("AdamW8bit"),
    "paged_adam8bit": _bitsandbytes("PagedAdamW8bit"),
    "paged_adamw": _bitsandbytes("PagedAdamW32bit"),
    "ademamix8bit": _bitsandbytes("AdEMAMix8bit"),
    "lion": _bitsandbytes("Lion"),
    "lion8bit": _bitsandbytes("Lion8bit"),
    "paged_lion8bit": _bitsandbytes("PagedLion8bit"),
    "muon": MuonWithAdamW,
    "adafactor": _adafactor,
    "adalomo": _adalomo,
    "apollo": _apollo,
}
