// The kernels of attention.cpp for one instruction set. A fragment follows all that it assumes.
// clang-format off
#if TFKERN_VEC_BYTES == 64
#include "attention/pair.inl"
#endif
#include "attention/product.inl"
#include "attention/rows.inl"
#include "attention/block.inl"
#include "attention/scores.inl"
#include "attention/forward.inl"
#include "attention/backward.inl"
