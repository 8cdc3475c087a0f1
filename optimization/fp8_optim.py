"""8-bit floating point (e4m3) on the GPUs that multiply in it: frozen models that are scored, and the generator.

Letters: N tokens, K in features, O out features.
"""

import torch
from torch import Tensor, nn

from optimization.gpu import ADA, NO_CARD, Card, find_card
from optimization.record import AppliedOptimization, Change, ChosenSettings, Obstacle, nothing
from schemas.evaluate import EvaluateRunConfig
from schemas.methods import method_of
from schemas.run import AnyRunConfig, RunConfig

_E4M3 = torch.float8_e4m3fn
_MAX = torch.finfo(_E4M3).max


def check_fp8_support(*, card: Card | None = None) -> ChosenSettings | Obstacle:
    """Whether this GPU multiplies in fp8 (compute 8.9 and above): `use_fp8`, or in `skipped` the reason against it."""
    card = card or find_card()
    if card is None:
        return nothing("fp8", f"not on this GPU: {NO_CARD}")
    if card.capability < ADA:
        return nothing("fp8", f"not on this GPU: {card} has no fp8 units (compute 8.9 and above: Ada, Hopper, later)")
    return ChosenSettings(name="fp8", settings={"use_fp8": True}, reason=f"{card} multiplies in fp8")


def choose_fp8(config: AnyRunConfig, *, card: Card | None = None) -> ChosenSettings | Obstacle:
    """The settings that fp8 brings to this run on this GPU; nothing is loaded yet."""
    choose = method_of(config).choose_fp8
    if choose is None:
        return nothing("fp8", "this run has neither a generator nor a frozen model of its own")
    choice: ChosenSettings | Obstacle = choose(config, card=card)
    return choice


def choose_fp8_of_teacher(config: RunConfig, *, card: Card | None = None) -> ChosenSettings | Obstacle:
    """fp8 for the KV cache, the generator and frozen models of a teacher's run.

    The generator's weights change only where the teacher is not quantised: a quantised teacher's own values serve its
    generator, and fp8 ones would be another policy (0.26 to 0.6 nats away on a model with outlier channels).
    """
    support = check_fp8_support(card=card)
    if isinstance(support, Obstacle):
        return support
    quantised = config.model_args.load_in_8bit or config.model_args.load_in_4bit
    settings: dict[str, str] = {}
    reasons = []
    samples_with_vllm = config.generator != "transformers"
    if not samples_with_vllm:
        reasons.append("KV cache and generator weights: generator=transformers samples from the trainer itself")
    elif config.kv_cache_dtype == "auto":
        settings["kv_cache_dtype"] = "fp8"
    if samples_with_vllm and quantised:
        reasons.append("generator weights: they are the quantised teacher's own values, and stay so")
    elif samples_with_vllm and config.generator_weights == "auto":
        settings["generator_weights"] = "fp8"
    if config.student_model is None and config.reference_model == "shared":
        reasons.append("scoring: student and reference are the teacher's own base")
    elif config.scoring_weights == "auto":
        settings["scoring_weights"] = "fp8"
    if not settings:
        return nothing("fp8", "; ".join(reasons) or "the configuration sets what it would choose already")
    return ChosenSettings(
        name="fp8",
        settings=settings,
        reason="KV cache: half the bytes per token; scoring of frozen models: not measured",
        skipped="; ".join(reasons) or None,
    )


def choose_fp8_of_evaluation(config: EvaluateRunConfig, *, card: Card | None = None) -> ChosenSettings | Obstacle:
    """fp8 for vLLM's KV cache; the weights that are evaluated stay what they are."""
    support = check_fp8_support(card=card)
    if isinstance(support, Obstacle):
        return support
    if config.generator == "transformers" or config.kv_cache_dtype != "auto":
        return nothing("fp8", "vLLM's KV cache is set otherwise (kv_cache_dtype, or generator=transformers)")
    return ChosenSettings(name="fp8", settings={"kv_cache_dtype": "fp8"}, reason="half the bytes per token")


class Fp8Linear(nn.Module):
    """A frozen linear in e4m3: one scale per output row, activations with one scale per token, 16-bit results.

    y = (x_q @ w_q^T) * s_x * s_w with x_q = e4m3(x / s_x), s_x = max|x| / 448 of the token. No gradient.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight_OK, scale_O1 = _quantise_rows(linear.weight.detach())
        self.register_buffer("weight", weight_OK)
        self.register_buffer("scale", scale_O1.t().contiguous())
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach())

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        quantised_NK, scale_N1 = _quantise_rows(x.reshape(-1, self.in_features))
        if x.device.type != "cpu":
            product_NO = torch._scaled_mm(
                quantised_NK, self.weight.t(), scale_a=scale_N1, scale_b=self.scale, out_dtype=torch.bfloat16
            )
        else:  # torch 2.11 takes a scale for each row in this product on a GPU only
            product_NO = (quantised_NK.float() @ self.weight.float().t() * scale_N1 * self.scale).bfloat16()
        product_NO = product_NO if self.bias is None else product_NO + self.bias
        return product_NO.to(x.dtype).reshape(*x.shape[:-1], self.out_features)


def _quantise_rows(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """e4m3 values and the float32 scale [rows, 1] that gives the matrix back.

    The division promotes a 16-bit matrix to float32 as it reads it: 5 bytes per value beside the matrix at the peak.
    """
    scale = matrix.abs().amax(dim=-1, keepdim=True).float().clamp(min=1e-12) / _MAX
    return (matrix / scale).to(_E4M3), scale


def quantise_to_fp8(model: nn.Module) -> AppliedOptimization | Obstacle:
    """Replace the linears of a frozen model's blocks (not its head) by `Fp8Linear`; undo puts the old ones back."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    found = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if type(child) is nn.Linear and child is not head and child.in_features % 16 == child.out_features % 16 == 0
    ]
    if not found:
        return nothing("fp8 weights", f"{type(model).__name__} has no plain linear layer to convert")
    for parent, name, linear in found:
        setattr(parent, name, Fp8Linear(linear))

    def undo() -> None:
        for parent, name, linear in found:
            setattr(parent, name, linear)

    num_weights = sum(linear.weight.numel() for _, _, linear in found)
    return AppliedOptimization(
        name="fp8 weights",
        changes=(Change(what=f"{len(found)} linear layers", before=str(found[0][2].weight.dtype), after=str(_E4M3)),),
        effect=f"{num_weights / 1e9:.2f} GB of weights instead of {2 * num_weights / 1e9:.2f} (computed)",
        undo_steps=[undo],
    )
