"""What quantized layers share: a weight that ends as integer codes, and its packed form for the kernels."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.grad import conv2d_input

from .. import ops
from ..quantizers.weight import WeightQuantizer
from .hooks import share_hooks
from .packed import Packed, pack
from .tracing import Copied, derived, versions, were_edited

if TYPE_CHECKING:
    from typing_extensions import Self

# Of the underscored attributes of a convolution, the only one that is not nn.Module's own bookkeeping.
_KEPT = ("_reversed_padding_repeated_twice",)

# Of refused adapters: diffusers 0.42 takes one for loaded before PEFT meets the layer that refuses it.
BEFORE_ANOTHER = "call unload_lora() before trying again"


class BlockPlan:
    """What a fused block derived from its layers; they share it, so that any of them can call it outdated."""

    def __init__(self) -> None:
        self.value: Any = None
        self.copied: Copied = []

    def __getstate__(self) -> dict[str, Any]:
        """Copies derive their own."""
        return {"value": None, "copied": []}


class CodedLayer(nn.Module):
    """A Conv2d or Linear whose weight is float until it becomes codes (`_become_integer`).

    What is packed follows moves, loading, and parameters that are assigned. A bias in float32 is read where
    it lies, so that every edit is seen. In 16 bits, and where fused blocks join projections or reorder them
    for GEGLU, it is copied: edits in place are seen, but not those through `.data`, nor any in graphs that
    `torch.compile` made before. Nor are edits of codes. `drop_packed` has all derived anew.
    """

    weight: Tensor  # an nn.Parameter: float [O, C, *]; or codes, i8 or packed [O, ceil(K/32) * 16] u8
    bias: Tensor | None  # [O]
    weight_scale: Tensor  # [S, O] f32
    groups = 1  # of a convolution
    hadamard = 0  # input channels that are rotated together, as those of the weight; 0 for none
    is_requantized = False  # whether the codes are of other values than those that the model was made of

    @classmethod
    def taking_over(cls, layer: nn.Conv2d | nn.Linear) -> Self:
        """A twin with the settings of a float layer; its parameters are shared, not copied."""
        twin = cls.__new__(cls)
        nn.Module.__init__(twin)
        settings = {k: v for k, v in layer.__dict__.items() if not k.startswith("_") or k in _KEPT}
        twin.__dict__.update(settings)
        share_hooks(layer, twin)
        twin.weight, twin.bias = layer.weight, layer.bias
        return twin

    def set_up_weight(self, quantizer: WeightQuantizer, device: torch.device) -> None:
        """Add the scales, on `device`, and what is derived from codes."""
        self.weight_quantizer = quantizer
        segments = 1 if quantizer.split is None else 2
        self.register_buffer("weight_scale", torch.ones(segments, self.weight.shape[0], device=device))
        self.weight_shape = self.weight.shape
        self.is_frozen = False
        self._packed: Packed | None = None
        self._copied: Copied = []  # the bias, unless packed layers read it where it lies
        self._codes_memory: weakref.ref[Any] | None = None  # that what is derived was derived from
        self.plan = BlockPlan()  # of the fused block around this layer

    @property
    def quantizers(self) -> list[Any]:
        """Of the input segments, where they are known before the input is."""
        return []

    @property
    def outputs(self) -> int | ops.ConvGeometry:
        """What the operator is told of the layer's shape."""
        raise AssertionError("a subclass says what it computes")

    def multiply(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The product of the layer's kind."""
        raise AssertionError("a subclass says how it multiplies")

    def integer(self, x: Tensor) -> Tensor:
        """The layer in integers, without gradients."""
        raise AssertionError("a subclass says where its ranges are from")

    def gradient_mask(self, x: Tensor) -> Tensor | None:
        """Where quantizing x lets a gradient pass, bool like x; None for everywhere."""
        return None

    def with_gradient(self, x: Tensor) -> Tensor:
        """The layer in integers, whose gradient passes as if it were the float layer of its codes."""
        if torch.is_grad_enabled():
            bias = self.bias
            if x.requires_grad or (bias is not None and bias.requires_grad):
                result: Tensor = _StraightThrough.apply(x, bias, self)
                return result
        return self.integer(x)

    def input_gradient(self, grad: Tensor, shape: torch.Size) -> Tensor:
        """Gradient of a rotated input of `shape` from that of the result, through the values of the codes."""
        raise AssertionError("a subclass says how it multiplies")

    def bias_gradient(self, grad: Tensor) -> Tensor:
        """Gradient [O] of the bias from that of the result."""
        raise AssertionError("a subclass says where its channels are")

    def codes(self) -> Tensor:
        """Weight codes [O, C, *] i8 of the frozen layer."""
        return self.weight_quantizer.restore(self.weight.data, self.weight_shape)

    def dequantized_weight(self) -> Tensor:
        """Values [O, C, *] f32 of the codes, in channels_last where they are four-dimensional.

        Of a layer that rotates its channels they are rotated back, to multiply inputs as they come.
        """
        return self.rotated(self._values())

    def _values(self) -> Tensor:
        """Values [O, C, *] f32 of the codes, whose columns multiply what the kernels see."""
        values = self.weight_quantizer.dequantize(self.codes(), self.weight_scale)
        return values.contiguous(memory_format=torch.channels_last) if values.dim() == 4 else values

    def rotated(self, x: Tensor) -> Tensor:
        """Inputs [*, C] or a weight, its channels rotated, in float32, or back; x where none are."""
        return ops.hadamard(x, self.hadamard) if self.hadamard else x

    def prepare_frozen(self) -> None:
        """Take the shapes of a frozen layer, for loading a checkpoint into."""
        shape, dtype = self.weight_quantizer.stored_shape(self.weight_shape)
        self._become_integer(torch.empty(shape, dtype=dtype, device=self.weight.device))

    def _become_integer(self, stored: Tensor) -> None:
        self.weight = nn.Parameter(stored, requires_grad=False)
        self.drop_packed()
        self.is_frozen = True

    def quantize_values(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Stored codes and scales [S, O] f32 of weight values [O, C, *] f32, each rounded to nearest."""
        raise AssertionError("a subclass says how it finds scales")

    def requantize(self, weight: Tensor) -> None:
        """Take over other weight values [O, C, *] f32, with the bits that the layer has."""
        self.store(*self.quantize_values(self.rotated(weight)))
        self.is_requantized = True

    def store(self, stored: Tensor, scale: Tensor) -> None:
        """Exchange codes and scales; the parameter and the buffer stay the objects that offloading knows."""
        self.weight.data, self.weight_scale.data = stored, scale
        self.drop_packed()

    def packed(self, device: torch.device) -> Packed:
        """The layer as the kernels of a device want it, derived at first use."""
        packed: Packed = derived(self, "kept_packed")
        if packed.device != device:
            raise ValueError(f"{type(self).__name__}: input is on {device}, its weight on {packed.device}")
        return packed

    @property
    def kept_packed(self) -> Packed:
        """The packed form on the device of the weight, derived at first use and after a change."""
        packed = self._packed
        is_old = self._copied and were_edited(self._copied)
        if is_old or packed is None or packed.device != self.weight.device:
            packed = pack([self])
            self._copied = versions([self.bias] if packed.copies(self.bias) else [])
            # A copy of the current group would grow old.
            self._packed = packed if all(q.is_beside_its_step for q in self.quantizers) else None
        return packed

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Take another parameter, by assignment too."""
        super().register_parameter(name, param)
        if "plan" in self.__dict__:
            self.drop_packed()

    def drop_packed(self) -> None:
        """Forget what was derived from the codes: they, or the device, are about to change."""
        self._packed = self._codes_memory = self.plan.value = None
        self._copied = self.plan.copied = []

    def derived_entries(self) -> list[tuple[dict[str, Any], str]]:
        """Where what was derived stands, as entries of dicts: with other values it was made anew."""
        return [(self.__dict__, "_packed"), (self.__dict__, "plan"), (self.plan.__dict__, "value")]

    def copied(self) -> Copied:
        """Parameters that something derived holds copies of, those of the block around it as well."""
        return [*self._copied, *self.plan.copied]

    def drop_with_codes(self) -> None:
        """Let what is derived from the codes live no longer than their memory does.

        Group offloading onto disk or with a stream exchanges `weight.data`, of which no module hears.
        """
        layer = weakref.ref(self)

        def drop(_: Any) -> None:
            alive = layer()
            if alive is not None:
                alive.drop_packed()

        self._codes_memory = weakref.ref(self.weight.untyped_storage(), drop)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Follow .to(): the packed copy is rebuilt where that moves something, scales stay float32.

        Codes keep their layout: kernels read the packed copy, and in channels_last they would be a copy in
        memory of what is mapped from the checkpoint.
        """
        before = self._places()
        scale, stored = self.weight_scale, self.weight.data
        super()._apply(fn, recurse)
        if _only_strides_differ(self.weight.data, stored):
            self.weight.data = stored
        if self._places() != before:
            self.drop_packed()
        if self.weight_scale.dtype != torch.float32:
            self.weight_scale = scale.to(self.weight_scale.device)
        return self

    def _places(self) -> list[tuple[Any, ...]]:
        """Where the layer's tensors lie, and as what."""
        tensors = (self.weight, self.weight_scale, self.bias)
        return [(x.device, x.dtype, x.data_ptr()) for x in tensors if x is not None]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Take codes; of a float weight, which `copy_` would truncate to codes, nothing but an error."""
        self.drop_packed()
        key = f"{prefix}weight"
        stored = state_dict.get(key)
        if self.is_frozen and isinstance(stored, Tensor) and stored.dtype != self.weight.dtype:
            error_msgs: list[str] = args[-1]
            error_msgs.append(f"adpdm: {key} must be {self.weight.dtype}, its codes, got {stored.dtype}")
        else:
            super()._load_from_state_dict(state_dict, prefix, *args)

    def __getstate__(self) -> dict[str, Any]:
        """Leave the packed copy behind: it is derived from the codes."""
        return {**self.__dict__, "_packed": None, "_copied": [], "_codes_memory": None}


class CodedConv2d(CodedLayer, nn.Conv2d):
    """The products of a convolution: [N, C, H, W] float to [N, O, Ho, Wo] of the same dtype."""

    def __new__(cls, *settings: Any, **named: Any) -> Any:
        """A float convolution for who asks by settings, as PEFT does to make adapters of a layer's class."""
        return nn.Conv2d(*settings, **named) if settings or named else super().__new__(cls)

    def multiply(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        output: Tensor = self._conv_forward(x, weight, bias)
        return output

    def input_gradient(self, grad: Tensor, shape: torch.Size) -> Tensor:
        weight = self._values().to(grad.dtype)
        settings = (self.stride, self.padding, self.dilation, self.groups)
        return conv2d_input(shape, weight, grad, *settings)  # type: ignore[no-any-return]

    def bias_gradient(self, grad: Tensor) -> Tensor:
        return grad.sum((0, 2, 3))

    @property
    def outputs(self) -> ops.ConvGeometry:
        assert not isinstance(self.padding, str)
        kernel_size, stride = _pair(self.kernel_size), _pair(self.stride)
        padding, dilation = _pair(self.padding), _pair(self.dilation)
        return ops.ConvGeometry(self.out_channels, kernel_size, stride, padding, dilation, self.groups)


class CodedLinear(CodedLayer, nn.Linear):  # type: ignore[misc]  # torch types the bias as never None
    """The product of a linear layer: [*, K] float to [*, O] of the same dtype."""

    def multiply(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return nn.functional.linear(x, weight, bias)

    def input_gradient(self, grad: Tensor, shape: torch.Size) -> Tensor:
        return grad @ self._values().to(grad.dtype)

    def bias_gradient(self, grad: Tensor) -> Tensor:
        return grad.reshape(-1, grad.shape[-1]).sum(0)

    @property
    def outputs(self) -> int:
        return self.out_features


class _StraightThrough(torch.autograd.Function):
    """The integer layer forward; backward as if rounding were the identity, which within the range it is."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, layer: CodedLayer) -> Tensor:
        ctx.layer, ctx.shape = layer, x.shape
        ctx.bias_dtype = None if bias is None else bias.dtype
        # Now: the next step may have other ranges.
        ctx.mask = layer.gradient_mask(x) if ctx.needs_input_grad[0] else None
        return layer.integer(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        of_input = of_bias = None
        if ctx.needs_input_grad[0]:
            of_input = ctx.layer.input_gradient(grad, ctx.shape)
            of_input = of_input if ctx.mask is None else of_input * ctx.mask
            of_input = ctx.layer.rotated(of_input).to(grad.dtype)
        if ctx.needs_input_grad[1]:
            of_bias = ctx.layer.bias_gradient(grad).to(ctx.bias_dtype)
        return of_input, of_bias, None


def _only_strides_differ(moved: Tensor, stored: Tensor) -> bool:
    """Whether codes were brought into another layout on the device where they are."""
    is_same = moved.dtype == stored.dtype == torch.int8 and moved.device == stored.device
    return is_same and moved.shape == stored.shape and moved.stride() != stored.stride()


def _pair(values: tuple[int, ...]) -> tuple[int, int]:
    first, second = values
    return first, second
