"""Repairs Triton's interpreter where it departs from what a GPU computes.

The interpreter of Triton 3.6 keeps bfloat16 as uint16 bit patterns in numpy. Its faults are:
- It multiplies and adds the patterns as integers, in `tl.dot` as in elementwise arithmetic.
- It truncates when it converts from float32, loses subnormals when it converts back, and takes the
  *value* of an integer or a float64 for the pattern.
- `tl.maximum(nan, x)` is NaN; on a GPU it is x unless `propagate_nan` asks otherwise.
- `tl.fma` rounds the product, although its purpose is to keep the product exact.
- `tl.dot` leaves the order of its sums to a BLAS, and the order differs if a tile has another shape
  or is transposed. Repaired, products of float32 and less are summed in float64 and rounded once.
- A loop bound becomes an index by way of an array of one dimension, which numpy 2.4 refuses.

`tl.sum` and atomics over bfloat16 are not repaired: kernels accumulate in float32.
"""

import functools

import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def widen(bits: np.ndarray) -> np.ndarray:
    """bfloat16 bit patterns -> float32, which is exact."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def narrow(x: np.ndarray) -> np.ndarray:
    """Numbers -> bfloat16 bit patterns, rounded to nearest even. NaN becomes 0x7FFF, as a GPU's
    `cvt.rn.bf16` makes it."""
    x = x.astype(np.float32)
    bits = x.view(np.uint32).astype(np.uint64)  # the sum for a NaN needs 33 bits
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return np.where(np.isnan(x), 0x7FFF, rounded).astype(np.uint16)


def _is_bfloat16(handle: TensorHandle) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def _widened(handle: TensorHandle) -> TensorHandle:
    return TensorHandle(widen(handle.data), tl.float32) if _is_bfloat16(handle) else handle


@functools.cache  # so that a second call does not wrap the wrappers
def patch() -> None:
    """Installs the repairs for the rest of the process."""
    dot, fma = InterpreterBuilder.create_dot, InterpreterBuilder.create_fma
    cast = InterpreterBuilder.cast_impl
    binary, patch_tensor = InterpreterBuilder.binary_op, interpreter._patch_lang_tensor

    def create_dot(self, a, b, acc, *args):
        a, b = _widened(a), _widened(b)
        if acc.dtype.scalar != tl.float32 or a.data.itemsize == 1 or b.data.itemsize == 1:
            return dot(self, a, b, acc, *args)
        product = np.matmul(a.data, b.data, dtype=np.float64)
        return TensorHandle((product + acc.data).astype(np.float32), tl.float32)

    def create_fma(self, x, y, z):
        dtype = z.dtype.scalar
        if dtype not in (tl.float32, tl.float16, tl.bfloat16):
            return fma(self, x, y, z)
        x, y, z = (_widened(a).data.astype(np.float64) for a in (x, y, z))
        return self.cast_impl(TensorHandle(x * y + z, tl.float64), dtype)

    def cast_impl(self, src, dst_type):
        src = _widened(src)
        if dst_type.scalar == tl.bfloat16:
            return TensorHandle(narrow(src.data), tl.bfloat16)
        return cast(self, src, dst_type)

    def binary_op(self, lhs, rhs, op):
        if not _is_bfloat16(lhs):
            return binary(self, lhs, rhs, op)
        result = op(widen(lhs.data), widen(rhs.data))
        is_comparison = result.dtype == np.bool_
        return TensorHandle(result if is_comparison else narrow(result), tl.bfloat16)

    def patch_lang_tensor(tensor, scope):
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    InterpreterBuilder.create_dot = create_dot
    InterpreterBuilder.create_fma = create_fma
    InterpreterBuilder.cast_impl = cast_impl
    InterpreterBuilder.binary_op = binary_op
    InterpreterBuilder.create_maxnumf = lambda self, x, y: self.binary_op(x, y, np.fmax)
    InterpreterBuilder.create_minnumf = lambda self, x, y: self.binary_op(x, y, np.fmin)
    InterpreterBuilder.get_bf16 = lambda self, value: TensorHandle(
        narrow(np.array([value])), tl.bfloat16
    )
    interpreter._patch_lang_tensor = patch_lang_tensor
