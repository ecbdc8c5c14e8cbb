"""What every CUDA operation takes and gives, as one table: the structs of sana_edge.h, shapes and dtypes."""

from __future__ import annotations

import ctypes
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# A field of a struct in each line, in the header's order: pointers with kind and shape, then the numbers.
#
# Kinds: int8, int32, fp32; "half" is the operation's one 16-bit type, "any" may be fp32; "vector" is fp32,
# (C,) for all images or (B, 1, C) with any stride along B; "result" is what the launch says; "bytes" is a
# workspace. With "?" it may be left out, with ">" it is written ("?>": where its scale is given), with "~"
# its rows are evenly spaced.
# "*rows" are leading dimensions; a number "rows=images*tokens" is a product of sizes. Names of tensors and
# numbers are those of the reference's arguments.
_TABLE = """
quantize_rows
  x              any     *rows columns
  static_scale   fp32?
  values         int8>   *rows columns
  scales         fp32>   *rows
  | q rows, i columns, i type
norm_modulate_quantize
  x              any     images tokens columns
  scale          vector  images columns
  shift          vector  images columns
  static_scale   fp32?
  values         int8>   images tokens columns
  scales         fp32>   images tokens
  | q rows=images*tokens, i columns, i tokens, q stride, f eps, i type
w8a8_linear
  values         int8    *rows depth
  scales         fp32    *rows
  weight         int8    columns depth
  weight_scales  fp32    columns
  bias           fp32?   columns
  gate           vector? images columns
  residual       half?   *rows columns
  constant       vector? images columns
  out            half>   *rows columns
  | q rows, i columns, i depth, i tokens, i type, q gate_stride, q constant_stride, f limit, i silu, i tile
w8a8_linear_quantize
  values         int8    *rows depth
  scales         fp32    *rows
  weight         int8    columns depth
  weight_scales  fp32    columns
  bias           fp32?   columns
  gate           vector? images columns
  residual       half?   *rows columns
  constant       vector? images columns
  scale          vector? images columns
  shift          vector? images columns
  static_scale   fp32?
  plain_static_scale fp32?
  out            half>   *rows columns
  next_values    int8>   *rows columns
  next_scales    fp32>   *rows
  workspace      bytes?
  | q workspace_bytes, q rows, q gate_stride, q constant_stride, q scale_stride, q shift_stride
  | i columns, i depth, i tokens, i type, i plain_first, i plain_end, f limit, f eps, i tile
qkv_linear_attention
  values         int8    images tokens depth
  scales         fp32    images tokens
  weight         int8    3*heads*32 depth
  weight_scales  fp32    3*heads*32
  bias           fp32?   3*heads*32
  q              half>   images tokens heads*32
  state          fp32>   images heads 33 32
  workspace      bytes?
  | q workspace_bytes, i images, i tokens, i heads, i depth, i type
qk_norm_linear_attention
  qkv            half    images tokens 3*heads*32
  norm_k         fp32    heads*32
  roots          fp32>   images tokens 2
  state          fp32>   images heads 33 32
  workspace      bytes?
  | q workspace_bytes, i images, i tokens, i heads, f norm_eps, i type
linear_attention_finish
  q              half~   images tokens heads*32
  roots          fp32?   images tokens 2
  norm_q         fp32?   heads*32
  state          fp32    images heads 33 32
  static_scale   fp32?
  values         int8>   images tokens heads*32
  scales         fp32>   images tokens
  | i images, i tokens, i heads, i type, q q_stride, f eps
cross_attention_quantize
  q              half    prompts tokens heads*head_dim
  norm_q         fp32?   heads*head_dim
  keys           half    prompts heads capacity head_dim
  values_transposed half prompts heads head_dim capacity
  lengths        int32   prompts
  static_scale   fp32?
  values         int8>   prompts tokens heads*head_dim
  scales         fp32>   prompts tokens
  | i prompts, i tokens, i heads, i head_dim, i capacity, i type, f norm_eps
dwconv_glu_quantize
  x              half    images height*width 2*hidden
  weight         half    3 3 2*hidden
  bias           fp32    2*hidden
  static_scale   fp32?
  values         int8>   images height*width hidden
  scales         fp32>   images height*width
  | i images, i height, i width, i hidden, i type
patch_embed
  latent         fp32    images channels height width
  weight         fp32    channels columns
  bias           fp32    columns
  positions      fp32?   height*width columns
  out            half>   copies*images height*width columns
  | i images, i copies, i channels, i height, i width, i columns, i type
velocity_head
  x              half    guided*images height*width columns
  scale          vector  guided*images columns
  shift          vector  guided*images columns
  weight         fp32    channels columns
  bias           fp32    channels
  guidance       fp32?
  out            fp32>   images channels height width
  | q stride, i images, i tokens=height*width, i columns, i channels, f eps, i type
sampler_step
  x              fp32    images channels height width
  velocity       fp32    images channels height width
  before         fp32    images channels height width
  noise          fp32    images channels height width
  coefficients   fp32    7
  out            fp32>   images channels height width
  clean          fp32>   images channels height width
  | q size=images*channels*height*width
w8a8_conv2d
  values         int8    images height width depth
  scale          fp32
  weight         int8    *outer kernel kernel depth
  weight_scales  fp32    corners*columns
  bias           fp32?   shuffled*columns
  norm_weight    fp32?   columns
  norm_bias      fp32?   columns
  out_norm_weight fp32?  columns
  out_norm_bias  fp32?   columns
  residual       half?   images factor*height factor*width columns
  shortcut       half?   images height width wide
  out_scale      fp32?
  next_scale     fp32?
  finite         fp32?
  out            result> images factor*height factor*width columns
  next_values    int8?>  images factor*height factor*width columns
  | i images, i height, i width, i depth, i columns, i kernel, i upsample, i activation
  | i out_activation, i repeats, f norm_eps, i type
norm_add_quantize
  y              half    *rows columns
  x              half    *rows columns
  weight         fp32    columns
  bias           fp32    columns
  static_scale   fp32?
  out            half>   *rows columns
  values         int8>   *rows columns
  scales         fp32>   *rows
  | q rows, i columns, f eps, i type
tensor_scale
  x              any     *rows columns
  scale          fp32>
  workspace      bytes?
  | q workspace_bytes, q rows, i columns, i type
multiscale_linear_attention
  qkv            half    images height*width 3*heads*32
  depthwise      fp32?   5 5 3*heads*32
  pointwise      fp32?   3*heads*32 32
  q              half>   images height*width copies*heads*32
  state          fp32>   images copies*heads 33 32
  workspace      bytes?
  | q workspace_bytes, i images, i height, i width, i heads, i type
quantize_digits
  x              fp32    *rows wide
  digits         int8>   *rows 2 columns
  steps          fp32>   *rows
  | q rows, i columns, i gated
add_norm_digits
  x              fp32    *rows columns
  y              fp32?   *rows columns
  post_weight    fp32?   columns
  weight         fp32    columns
  total          fp32>   *rows columns
  digits         int8>   *rows 2 columns
  steps          fp32>   *rows
  | q rows, i columns, f eps
w8a16_linear
  digits         int8    *rows 2 depth
  steps          fp32    *rows
  weight         int8    columns depth
  weight_scales  fp32    columns
  bias           fp32?   columns
  rotation       fp32?   tokens pairs 2
  out            fp32>   *rows columns
  | q rows, i columns, i depth, i tokens, i pairs, i rotated
soft_capped_attention
  qkv            fp32    prompts tokens width
  prefix_keys    any     kv_heads capacity head_dim
  prefix_values  any     kv_heads capacity head_dim
  known          int32
  out            fp32>   prompts tokens heads*head_dim
  | i prompts, i tokens, i heads, i kv_heads, i head_dim, i capacity, i window, i type, f scale, f cap
"""

_NUMBERS = {"q": ctypes.c_int64, "i": ctypes.c_int32, "f": ctypes.c_float}


@dataclass(frozen=True)
class Size:
    """A dimension, ``factor`` times the sizes ``names``."""

    factor: int
    names: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> Size:
        parts = text.split("*")
        factor = math.prod(int(part) for part in parts if part.isdigit())
        return cls(factor, tuple(part for part in parts if not part.isdigit()))

    def __call__(self, sizes: Mapping[str, Any]) -> Any:
        return self.factor * math.prod(sizes[name] for name in self.names)


@dataclass(frozen=True)
class Pointer:
    """A tensor of an operation; ``lead`` names its leading dimensions, which may be any number."""

    name: str
    kind: str
    lead: str
    shape: tuple[Size, ...]
    optional: bool
    written: bool
    spaced: bool

    @classmethod
    def parse(cls, name: str, kind: str, *shape: str) -> Pointer:
        lead = shape[0] if shape and shape[0].startswith("*") else ""
        sizes = tuple(map(Size.parse, shape[1:] if lead else shape))
        return cls(name, kind.strip("?>~"), lead, sizes, "?" in kind, ">" in kind, "~" in kind)

    def dimensions(self, sizes: Mapping[str, Any]) -> tuple[int, ...]:
        """The shape at sizes; KeyError where one is not known."""
        return (*(sizes[self.lead] if self.lead else ()), *(size(sizes) for size in self.shape))


@dataclass(frozen=True)
class Operation:
    """One operation: its tensors, and the numbers of its struct, each a size or a value of that name."""

    name: str
    pointers: tuple[Pointer, ...]
    names: tuple[str, ...]
    numbers: Mapping[str, Size]
    struct: type[ctypes.Structure]

    @classmethod
    def parse(cls, text: str) -> Operation:
        name, *lines = (line.strip() for line in text.splitlines())
        pointers = tuple(Pointer.parse(*line.split()) for line in lines if line[0] != "|")
        fields: list[tuple[str, Any]] = [(pointer.name, ctypes.c_void_p) for pointer in pointers]
        products = {}
        for entry in ", ".join(line[2:] for line in lines if line[0] == "|").split(", "):
            kind, _, number = entry.partition(" ")
            number, _, product = number.partition("=")
            fields.append((number, _NUMBERS[kind]))
            products[number] = Size.parse(product or number)
        names = tuple(pointer.name for pointer in pointers)
        return cls(
            name, pointers, names, products, type("Arguments", (ctypes.Structure,), {"_fields_": fields})
        )


OPERATIONS = {
    operation.name: operation for operation in map(Operation.parse, re.split(r"\n(?! )", _TABLE.strip()))
}
