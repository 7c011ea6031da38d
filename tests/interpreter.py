"""Triton's interpreter, made right for bfloat16.

It keeps bfloat16 as its bits, in uint16. Its products then multiply these bits and its casts from float32 truncate
(Triton 3.6 to 3.9). Here both are mended, and any other arithmetic on bfloat16 raises: a kernel converts first.
``tests/test_interpreter.py`` holds this file to torch.
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined

import numpy as np
import triton.language as tl
import triton.runtime.interpreter as triton_interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def to_float32(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def to_bfloat16(x: np.ndarray) -> np.ndarray:
    """The bits of ``x`` rounded to nearest, ties to even."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(x), (bits >> 16) | 0x40, rounded).astype(np.uint16)


def _is_bfloat16(x: TensorHandle) -> bool:
    return x.dtype.scalar == tl.bfloat16


def _dot(self, a, b, d, *rest, original=InterpreterBuilder.create_dot):
    a, b = (TensorHandle(to_float32(x.data), tl.float32) if _is_bfloat16(x) else x for x in (a, b))
    return original(self, a, b, d, *rest)


def _rounding(original):
    """A cast that rounds where it goes from float32 to bfloat16, and goes through float32 to and from other types."""

    def cast(self, source, target, *rest):
        if target.scalar == tl.bfloat16 and not _is_bfloat16(source):
            exact = source if source.dtype.scalar == tl.float32 else self.cast_impl(source, tl.float32)
            return TensorHandle(to_bfloat16(exact.data), tl.bfloat16)
        if _is_bfloat16(source) and target.scalar != tl.bfloat16:
            exact = TensorHandle(to_float32(source.data), tl.float32)
            return exact if target.scalar == tl.float32 else self.cast_impl(exact, target)
        return original(self, source, target, *rest)

    return cast


def _refusing(original):
    """Arithmetic that refuses bfloat16."""

    def operation(self, *args):
        if any(isinstance(x, TensorHandle) and _is_bfloat16(x) for x in args):
            raise TypeError("bfloat16 arithmetic is wrong in Triton's interpreter: convert to float32 in the kernel")
        return original(self, *args)

    return operation


def _refusing_bfloat16(original):
    def apply(self, input_param):
        inputs = input_param if isinstance(input_param, tuple) else (input_param,)
        if any(x.dtype.scalar == tl.bfloat16 for x in inputs):
            raise TypeError("bfloat16 arithmetic is wrong in Triton's interpreter: convert to float32 in the kernel")
        return original(self, input_param)

    return apply


class _Nothing:
    def restore(self):
        pass


_patched: set[tuple[int, ...]] = set()


def _patch_lang_once(fn, original=triton_interpreter._patch_lang):
    """The interpreter patches the language again at every call of a function, which takes half of its time."""
    modules = tuple(id(x) for x in fn.__globals__.values() if x is tl or x is tl.core)
    if modules in _patched:
        return _Nothing()
    scope = original(fn)
    _patched.add(modules)
    restore = scope.restore

    def restore_and_forget():
        restore()
        _patched.discard(modules)

    scope.restore = restore_and_forget
    return scope


triton_interpreter._patch_lang = _patch_lang_once
InterpreterBuilder.create_dot = _dot
for name in ("cast_impl", "create_fp_to_fp"):
    setattr(InterpreterBuilder, name, _rounding(getattr(InterpreterBuilder, name)))
for name in ("binary_op", "unary_op"):
    setattr(InterpreterBuilder, name, _refusing(getattr(InterpreterBuilder, name)))
for kind in (triton_interpreter.ReduceOps, triton_interpreter.ScanOps):
    kind.apply = _refusing_bfloat16(kind.apply)
