"""What a fused block is, which blocks of a denoiser run fused, and why the others do not."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..config import AttentionProducts
from .adapters import BASE
from .coded import BlockPlan
from .layers import QuantLayer, QuantLinear
from .packed import Packed
from .tracing import Copied, derived, versions, were_edited


class NotFusable(Exception):
    """Why a block keeps the path of one layer after the other, as a sentence without its subject."""


@dataclass(frozen=True)
class FusionInfo:
    """One block, or a quantized layer outside all blocks, and how it runs."""

    name: str
    kind: str  # class of the block or layer
    fused: bool
    reason: str  # why not, empty when it runs fused
    attention: str = ""  # what it multiplies, "int8" or "float", where the block is an attention

    @property
    def label(self) -> str:
        return f"{self.name} ({self.kind})" if self.name else self.kind

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> FusionInfo:
        """What `to_dict` gave, also that of a later version, which may tell more."""
        known = {field.name for field in fields(cls)}
        return cls(**{key: value for key, value in stored.items() if key in known})


class FusedBlock:
    """Stands in for the `forward` of one block of diffusers, computing the same function in fewer passes.

    It hangs in the instance (`block.forward`), so that the block keeps its class, its parameters and its
    names. Before every call it makes sure that nobody looks at, or has changed, what it skips; otherwise the
    forward of the class runs.

    Args:
        block: of the kind that a subclass knows.

    Raises:
        NotFusable: for settings that the subclass does not know.
    """

    is_float = False  # reads no codes: a matter of speed, of which nothing is reported
    int8: bool | None = None  # whether its attention multiplies codes on a CPU; None for other blocks

    def __init__(self, block: nn.Module) -> None:
        self.block = block
        self.forward = type(block).forward  # torch.compile reads no attributes of classes allowed in graphs
        self._links: list[
            tuple[dict[str, Any], str, nn.Module | None]
        ] = []  # (owner's children, name, child)
        self._modules: list[nn.Module] = [block]
        self._parts: list[FusedBlock] = []  # of blocks inside, run without their `__call__`
        self._quantizers: list[Any] = []
        self._kept: BlockPlan | None = None  # shared with the layers, who hear of moves, copies and loading
        self.inspect()

    # ---- what subclasses define ----

    def inspect(self) -> None:
        """Check the block's settings and `skip` every module whose own forward is not called."""
        raise AssertionError("a subclass knows its block")

    def make_plan(self) -> Any:
        """What is derived from weights: packed layers, norms in float32."""
        raise AssertionError("a subclass derives what it needs")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise AssertionError("a subclass computes")

    # ---- attention ----

    def choose_attention(self, products: AttentionProducts) -> None:
        """What attention multiplies; blocks without ignore it, those inside are told themselves."""
        if self.int8 is not None:
            self.int8 = ops.HAS_FAST_INT8_ATTENTION if products == "auto" else products == "int8"

    @property
    def attention(self) -> str:
        """What its attention multiplies if it is called now; empty for other blocks."""
        if self.int8 is None:
            return ""
        return "int8" if self.int8 and next(self.block.parameters()).device.type == "cpu" else "float"

    # ---- building ----

    def skip(self, name: str, kind: type[nn.Module]) -> Any:
        """The child of this name, of exactly this kind or a QuantLayer; its forward will not be called."""
        owner_name, _, child_name = name.rpartition(".")
        owner = self.block.get_submodule(owner_name)
        child = owner._modules.get(child_name)
        if isinstance(child, QuantLayer):
            if kind is not type(child):
                raise NotFusable(f"{name} is a {type(child).__name__}")
            if not child.is_frozen:
                raise NotFusable(f"{name} is not frozen")
            self._quantizers += child.quantizers
            self._kept = child.plan = self._kept or child.plan
        elif issubclass(kind, QuantLayer):
            raise NotFusable(f"{name} {_adapter(child) or 'is not quantized'}")
        elif type(child) is not kind:
            raise NotFusable(f"{name} is {_article(child)}, known is {kind.__name__}")
        assert child is not None
        self._links.append((owner._modules, child_name, child))
        self._modules.append(child)
        return child

    def hold(self, name: str, child: nn.Module | None) -> None:
        """Expect a child, or none, to stay what it is; its forward is called."""
        owner_name, _, child_name = name.rpartition(".")
        self._links.append((self.block.get_submodule(owner_name)._modules, child_name, child))

    def contain(self, name: str) -> Any:
        """The fused form of a block inside, which this one runs without its `__call__`."""
        owner_name, _, child_name = name.rpartition(".")
        owner = self.block.get_submodule(owner_name)
        child = owner.get_submodule(child_name)
        fused = child.__dict__.get("forward")
        if not isinstance(fused, FusedBlock):
            raise NotFusable(f"{name} is not fused")
        self._links.append((owner._modules, child_name, child))
        self._parts.append(fused)
        return fused

    def require(self, condition: bool, otherwise: str) -> None:
        if not condition:
            raise NotFusable(otherwise)

    # ---- running ----

    def applies(self, *inputs: Tensor | None) -> bool:
        """Whether the fused path computes what the block would; `reason` says why not.

        Where a gradient is wanted, of an input or a parameter, it is the layers that pass it on.
        """
        if torch.is_grad_enabled() and self._has_gradient(inputs):
            return False
        for module in self._modules:
            state = module.__dict__
            if state["training"] or state["_forward_hooks"] or state["_forward_pre_hooks"]:
                return False
        for owner, name, child in self._links:
            if owner.get(name) is not child:
                return False
        for module in self._modules[1:]:
            if "forward" in module.__dict__:
                return False
        return all(p.block.__dict__.get("forward") is p and p.applies() for p in self._parts)

    def _has_gradient(self, inputs: Sequence[Tensor | None]) -> bool:
        wanted = any(x is not None and x.requires_grad for x in inputs)
        return wanted or any(parameter.requires_grad for parameter in self.block.parameters())

    def reason(self) -> str:
        """Why the fused path would not be taken now, empty when it would."""
        for owner, name, child in self._links:
            if owner.get(name) is not child:
                return f"{name} {_adapter(owner.get(name)) or 'was replaced'}"
        for module in self._modules:
            kind = type(module).__name__
            if module.training:
                return f"{kind} is in training mode"
            if module._forward_hooks or module._forward_pre_hooks:
                return f"{kind} has hooks"
            if module is not self.block and "forward" in module.__dict__:
                return f"the forward of {kind} was replaced"
        return next((sentence for part in self._parts if (sentence := self._reason_of(part))), "")

    @staticmethod
    def _reason_of(part: FusedBlock) -> str:
        kind = type(part.block).__name__
        if part.block.__dict__.get("forward") is not part:
            return f"the forward of {kind} was replaced"
        reason = part.reason()
        return f"{kind} inside: {reason}" if reason else ""

    @property
    def plan(self) -> Any:
        return derived(self, "kept_plan")

    @property
    def kept_plan(self) -> Any:
        """The plan, made at first use, and after a layer called it outdated or a parameter was edited."""
        kept = self._kept
        assert kept is not None
        plan = kept.value
        if plan is None or (kept.copied and were_edited(kept.copied)):
            plan = self.make_plan()
            # As `CodedLayer.kept_packed`: a copy of the current group would grow old.
            kept.value = plan if all(q.is_beside_its_step for q in self._quantizers) else None
            kept.copied = self._copied()
        return plan

    def _copied(self) -> Copied:
        """What a plan may hold copies of: anything in 16 bits, biases of linear layers that are joined."""
        return versions(
            parameter
            for module in self._modules[1:]
            for parameter in module.parameters(recurse=False)
            if parameter.is_floating_point()
            and (parameter.dtype != torch.float32 or isinstance(module, QuantLinear))
        )

    def per_layer(self, *args: Any, **kwargs: Any) -> Any:
        """The forward of the block's class."""
        return self.forward(self.block, *args, **kwargs)


def _adapter(child: nn.Module | None) -> str:
    """What to say of a layer that PEFT has wrapped, active or folded in or not; empty for others."""
    return "has an adapter" if child is not None and BASE in child._modules else ""


def _article(child: nn.Module | None) -> str:
    return "missing" if child is None else f"a {type(child).__name__}"


def pack_of(layer: QuantLayer) -> Packed:
    """The packed form of a layer on the device where it is."""
    return layer.packed(layer.weight.device)


class NormCodes:
    """A normalisation that ends in the codes of the layer behind it; what it needs of both, in float32."""

    def __init__(self, norm: nn.GroupNorm | nn.LayerNorm, activation: ops.Activation) -> None:
        self.weight, self.bias = _row(norm.weight), _row(norm.bias)  # [C] f32
        self.eps, self.activation = norm.eps, activation
        self.norm_groups = norm.num_groups if isinstance(norm, nn.GroupNorm) else 1

    def group(
        self,
        sources: Sequence[Tensor],  # 1 or 2, [N, C_s, H, W] float
        quantizer: ops.OutputQuantizer,
        modulation: Tensor | None = None,  # [N, 2C] f32
    ) -> Tensor:
        """Codes [N, C, H, W] i8 of the normalised concatenation of the sources."""
        if quantizer.hadamard and len(sources) > 1:  # kernels that rotate read whole rows
            sources = [torch.cat(list(sources), 1)]
        rows = (self.weight, self.bias, modulation)
        return ops.group_norm_quantize(sources, *rows, quantizer, self.norm_groups, self.eps, self.activation)

    def each(self, sources: Sequence[Tensor], quantizers: Sequence[ops.OutputQuantizer]) -> list[Tensor]:
        """Codes i8 of two sources [N, C_s, H, W] float normalised as one, each under its own quantizer."""
        rows = (self.weight, self.bias)
        return ops.group_norm_quantize_each(
            sources, *rows, quantizers, self.norm_groups, self.eps, self.activation
        )

    def layer(
        self,
        x: Tensor,
        quantizer: ops.OutputQuantizer,
        modulation: Tensor | None = None,  # [images, 2C] f32
    ) -> Tensor:
        """Codes [*, C] i8 of normalised x [*, C] float."""
        return ops.layer_norm_quantize(x, self.weight, self.bias, modulation, quantizer, self.eps)


class SplitNormCodes:
    """A group norm before a convolution that quantizes the halves of a skip concatenation separately."""

    def __init__(self, norm: nn.GroupNorm, activation: ops.Activation, split: int) -> None:
        self.split, self.whole = split, NormCodes(norm, activation)
        per_group = norm.num_channels // norm.num_groups
        self.halves: list[NormCodes] = []
        if split % per_group == 0:
            bounds = ((0, split), (split, norm.num_channels))
            self.halves = [self._half(norm, activation, low, high) for low, high in bounds]

    @staticmethod
    def _half(norm: nn.GroupNorm, activation: ops.Activation, low: int, high: int) -> NormCodes:
        half = NormCodes(norm, activation)
        half.weight, half.bias = (None if r is None else r[low:high] for r in (half.weight, half.bias))
        half.norm_groups = (high - low) * norm.num_groups // norm.num_channels
        return half

    def group(self, sources: Sequence[Tensor], quantizers: Sequence[ops.OutputQuantizer]) -> list[Tensor]:
        """Codes i8 of each half under its own quantizer.

        Norm groups that end at the split make two norms of one half each. Where a group spans it, both
        halves need the statistics of all channels.
        """
        whole = sources if len(sources) == 2 else _halves(sources[0], self.split)
        if self.halves:
            pairs = zip(self.halves, whole, quantizers, strict=True)
            return [half.group([x], quantizer) for half, x, quantizer in pairs]
        return self.whole.each(whole, quantizers)


def _halves(x: Tensor, split: int) -> list[Tensor]:
    return [x.narrow(1, 0, split), x.narrow(1, split, x.shape[1] - split)]


def _row(parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else parameter.detach().float()


# ---- whole denoisers ---------------------------------------------------------------------------------------

KINDS: dict[str, type[FusedBlock]] = {}  # by class name within diffusers; filled by the files of the blocks


def fuses(*names: str) -> Callable[[type[FusedBlock]], type[FusedBlock]]:
    """Enter a fused form for blocks of these class names."""

    def enter(kind: type[FusedBlock]) -> type[FusedBlock]:
        KINDS.update(dict.fromkeys(names, kind))
        return kind

    return enter


def fuse_blocks(denoiser: nn.Module, attention: AttentionProducts = "auto") -> None:
    """Let the known blocks of a frozen denoiser run fused; saved format, names and classes stay.

    Args:
        attention: what attention multiplies on a CPU, see `QuantConfig`; blocks that are fused already
            change over.
    """
    for _, block, kind in _blocks(denoiser):
        if "forward" not in block.__dict__:
            try:
                block.forward = kind(block)
            except NotFusable:
                continue
        fused = block.forward
        if isinstance(fused, FusedBlock):
            fused.choose_attention(attention)


def unfuse_blocks(denoiser: nn.Module) -> None:
    """Undo `fuse_blocks`: one layer after the other."""
    for module in denoiser.modules():
        if isinstance(module.__dict__.get("forward"), FusedBlock):
            del module.forward


@contextmanager
def unfused(denoiser: nn.Module) -> Iterator[None]:
    """Run a denoiser one layer after the other for a while, to compare."""
    fused = [(m, m.forward) for m in denoiser.modules() if isinstance(m.__dict__.get("forward"), FusedBlock)]
    unfuse_blocks(denoiser)
    try:
        yield
    finally:
        for module, forward in fused:
            module.forward = forward


def describe_fusion(denoiser: nn.Module) -> list[FusionInfo]:
    """How every block, and every quantized layer outside the blocks, runs if it is called now."""
    infos: list[FusionInfo] = []
    inside: set[nn.Module] = set()
    known = [(name, block, _reason(block, kind)) for name, block, kind in _known_blocks(denoiser)]
    # An attention whose block computes it as a part of itself has no form of its own.
    absorbed = {part for _, block, reason in known if not reason for part in _skipped(block)}
    for name, block, reason in known:
        if block in absorbed:
            continue
        attention = "" if reason else block.__dict__["forward"].attention
        infos.insert(0, FusionInfo(name, type(block).__name__, not reason, reason, attention))
        inside |= set(block.modules())
    for name, layer in denoiser.named_modules():
        if isinstance(layer, QuantLayer) and layer not in inside:
            infos.append(FusionInfo(name, type(layer).__name__, False, "no known block around it"))
    return infos


def block_around(name: str, infos: Sequence[FusionInfo]) -> FusionInfo:
    """The innermost block around a quantized layer, or the layer itself: it says how the layer runs."""
    inside = [info for info in infos if not info.name or f"{name}.".startswith(f"{info.name}.")]
    return max(inside, key=lambda info: len(info.name))  # every quantized layer is in one, or is one itself


def summarize_fusion(infos: Sequence[FusionInfo]) -> str:
    """One line: how many run fused, what attention multiplies, and what keeps the others."""
    reasons = [f"{i.label}: {i.reason}" for i in infos if not i.fused]
    line = f"{len(infos) - len(reasons)} of {len(infos)} blocks"
    products = sorted({i.attention for i in infos if i.attention})
    line += f", attention in {' and '.join(products)}" if products else ""
    return f"{line}; not {'; '.join(reasons)}" if reasons else line


def _skipped(block: nn.Module) -> list[nn.Module]:
    """Modules within a fused block whose own forward is not called."""
    fused = block.__dict__["forward"]
    assert isinstance(fused, FusedBlock)
    return fused._modules[1:]


def _reason(block: nn.Module, kind: type[FusedBlock]) -> str:
    fused = block.__dict__.get("forward")
    if isinstance(fused, FusedBlock):
        return fused.reason()
    if fused is not None:
        return "its forward was replaced"
    try:
        kind(block)
    except NotFusable as reason:
        return str(reason)
    return "not fused: see fuse_blocks"


def _blocks(denoiser: nn.Module) -> Iterator[tuple[str, nn.Module, type[FusedBlock]]]:
    """Blocks with a fused form, inner ones first."""
    for name, module in reversed(list(denoiser.named_modules())):
        kind = KINDS.get(type(module).__name__)
        # Not those of single pipelines: AudioLDM 2 has a CrossAttnUpBlock2D of its own.
        if kind is not None and type(module).__module__.startswith("diffusers.models."):
            yield name, module, kind


def _known_blocks(denoiser: nn.Module) -> Iterator[tuple[str, nn.Module, type[FusedBlock]]]:
    """Those that run on codes, with something quantized inside."""
    for name, module, kind in _blocks(denoiser):
        if not kind.is_float and any(isinstance(m, QuantLayer) for m in module.modules()):
            yield name, module, kind


def grad_checkpointed(block: nn.Module) -> bool:
    """Whether the block would recompute parts in the backward pass."""
    return torch.is_grad_enabled() and bool(getattr(block, "gradient_checkpointing", False))
