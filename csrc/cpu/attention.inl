// The kernels of attention.cpp for one instruction set. A fragment follows all that it assumes.
// clang-format off
#include "attention/product.inl"
#include "attention/rows.inl"
#include "attention/block.inl"
#include "attention/scores.inl"
#include "attention/forward.inl"
#include "attention/backward.inl"
