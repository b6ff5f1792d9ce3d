// The activations of an MLP; kernels know nothing of torch.
#pragma once

namespace tfkern {

enum class Activation { relu, gelu, gelu_tanh, silu, quick_gelu };

}  // namespace tfkern
